/**
 * What prefill kernels of dense matrices do their own way: float16 weights as they are, an output one
 * chain of float32 multiply-adds by rising K.
 *
 * @module
 */
import { DENSE_K_ALIGN, DENSE_OCTET, DENSE_ROW_BLOCK } from "./order.ts";
import { eachOutput, type PrefillFrame, type WeightSource } from "./prefill_frame.ts";
import { times } from "./wgsl.ts";

const OCTETS = DENSE_K_ALIGN / DENSE_OCTET;

/** The weights and products of a dense kernel. */
export function denseWeights(frame: PrefillFrame): WeightSource {
  const { kernel: { tile }, k, threadColumns } = frame;
  const column = (i: string) => `(${i} % ${tile.columns}u)`;
  const quad = (a: string, b: string) =>
    `vec4<f16>(vec4<f32>(unpack2x16float(${a}), unpack2x16float(${b})))`;
  return {
    declarations: `@group(0) @binding(4) var<storage, read> weights: array<vec4<u32>>;`,
    prologue: `  let octets = (params.k + ${DENSE_K_ALIGN - 1}u) / ${DENSE_K_ALIGN}u * ${OCTETS}u;`,
    items: OCTETS * tile.columns,
    load: (i, slot) => [{
      name: `octet${slot}`,
      type: "vec4<u32>",
      value: (at) =>
        `weights[((column0 + ${column(i)}) / ${DENSE_ROW_BLOCK}u * octets + ` +
        `${at} / ${DENSE_OCTET}u + ${i} / ${tile.columns}u) * ${DENSE_ROW_BLOCK}u + ` +
        `(column0 + ${column(i)}) % ${DENSE_ROW_BLOCK}u]`,
    }],
    fill: (i, slot) =>
      `let thread = buffer_x + ${column(i)} % ${threadColumns}u;
let at = ${column(i)} / ${threadColumns}u * ${k.quads}u + ${i} / ${tile.columns}u * 2u;
tile_w[thread][at] = ${quad(`octet${slot}.x`, `octet${slot}.y`)};
tile_w[thread][at + 1u] = ${quad(`octet${slot}.z`, `octet${slot}.w`)};`,
    copies: [],
    own: [],
    products: products(frame),
  };
}

function products({ kernel: { tile, unroll }, k }: PrefillFrame): string {
  const quad = (q: string) =>
    `{
${
      times(
        tile.patchRows,
        (r) => `let a${r} = vec4<f32>(tile_x[buffer_y + ty][${q} + ${r * k.quads}u]);`,
      )
    }
${
      times(
        tile.patchColumns,
        (c) => `let b${c} = vec4<f32>(tile_w[buffer_x + tx][${q} + ${c * k.quads}u]);`,
      )
    }
${
      times(
        4,
        (e) =>
          eachOutput(
            tile,
            (r, c) => `acc${r}_${c} = fma(a${r}.${"xyzw"[e]}, b${c}.${"xyzw"[e]}, acc${r}_${c});`,
          ),
      )
    }
}`;
  return unroll
    ? times(k.quads, (q) => quad(`${q}u`))
    : `for (var q = 0u; q < ${k.quads}u; q++) ${quad("q")}`;
}
