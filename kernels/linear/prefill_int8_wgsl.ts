/**
 * What prefill kernels of the `int8` family do their own way: activations that come rounded
 * (`int8_rows.ts`), weights as the centroids' integers, products summed exactly.
 *
 * An output sums the products of each group of K, of all codebooks, in integers; that sum, times the
 * scales of the column, of the row's group and of the centroids, is added in float32 by rising K.
 *
 * @module
 */
import { int8Sum, int8Wgsl } from "./int8.ts";
import { INT8_WORD_K } from "./order.ts";
import { codePlaces, CODES_WGSL, gatherCodes, scaleAt } from "./prefill_code_wgsl.ts";
import {
  eachOutput,
  type PrefillFrame,
  rowPlace,
  type RowSource,
  viewRow,
  type WeightSource,
} from "./prefill_frame.ts";
import { itemPositions, type PrefillCode, threadGrid } from "./prefill_tile.ts";
import { times } from "./wgsl.ts";

/** The activations of an int8 kernel, and the scales of their groups times that of the centroids. */
export function int8RowSource(frame: PrefillFrame): RowSource {
  const { kernel: { tile }, k, pieces: { row, type }, buffers, tail } = frame;
  const words = `params.k / ${INT8_WORD_K}u`;
  const groups = `params.k / ${k.groupK}u`;
  return {
    type,
    declarations: `@group(0) @binding(7) var<storage, read> x_largest: array<f32>;
// [buffer][thread along the rows][row of its patch][group]
var<workgroup> row_scales: array<array<f32, ${tile.patchRows * k.groups}>, ${
      buffers * threadGrid(tile).rows
    }>;
// Word \`word\` of a row, whose words begin at \`row\`; zeros past K.
fn activations(row: u32, word: u32) -> ${type} {
${tail ? `  if (word >= ${words}) { return ${type}(); }` : ""}
  return x[row + word];
}`,
    copies: [
      {
        items: tile.rows * row,
        type,
        names: { item: "piece", start: "row", next: "next_x" },
        start: (i) => `${viewRow(`${i} / ${row}u`)} * (${words})`,
        value: (i, start, at) => `activations(${start}, ${at} / ${INT8_WORD_K}u + ${i} % ${row}u)`,
        put: (i, value) => `${rowPlace(frame, i)} = ${value};`,
      },
      {
        items: tile.rows * k.groups,
        type: "f32",
        names: { item: "row_group", start: "row_groups", next: "next_row_scale" },
        start: (i) => `${viewRow(`${i} / ${k.groups}u`)} * (${groups})`,
        value: (i, start, at) => {
          const group = `${at} / ${k.groupK}u + ${i} % ${k.groups}u`;
          const within = tail ? `min(${group}, ${groups} - 1u)` : group;
          return `x_largest[${start} + ${within}]`;
        },
        // Scaled no sooner than it is put: then nothing waits for the load.
        put: (i, value) => {
          const each = `${tile.patchRows * k.groups}u`;
          return `row_scales[buffer_y + ${i} / ${each}][${i} % ${each}] = ${value} * book_scale;`;
        },
      },
    ],
  };
}

/** The weights and products of an int8 kernel. */
export function int8Weights(frame: PrefillFrame, code: PrefillCode): WeightSource {
  const { kernel: { tile, unroll, members, packedDot }, k, pieces, buffers, threadColumns } = frame;
  const { m, v } = code.format;
  const positions = itemPositions(code)!;
  const { declarations, prologue, place, find, quad, ...source } = gatherCodes(
    frame,
    code,
    positions,
    "u32",
  );
  const perCode = v / 4;
  const itemWords = positions * v / INT8_WORD_K;
  const groupWords = k.groupK / INT8_WORD_K;
  const word = (c: number, w: number) =>
    Array.from({ length: 4 }, (_, e) => {
      const at = w * 4 + e;
      return quad(Math.floor(at / perCode), c, at % perCode);
    }).join(", ");
  return {
    ...source,
    declarations: `${CODES_WGSL}
${declarations}
${int8Wgsl(packedDot)}
// [buffer][thread along the columns][column of its patch][group]
var<workgroup> column_scales: array<array<f32, ${tile.patchColumns * k.groups}>, ${
      buffers * threadColumns
    }>;`,
    prologue: `${codePlaces(code)}
  let book_scale = bitcast<f32>(codebooks[${members * m * 256 * perCode}u + book_of(row_block)]);
${prologue}
${eachOutput(tile, (r, c) => `  var sum${r}_${c} = 0;`)}`,
    fill: (i, slot) =>
      `${place(i, itemWords)}
${find(slot)}
${
        times(m, (c) =>
          times(
            itemWords,
            (w) => `tile_w[thread][at + ${c * pieces.row + w}u] = vec4<u32>(${word(c, w)});`,
          ))
      }`,
    copies: [{
      items: tile.columns * k.groups,
      type: "f16",
      names: { item: "column_group", start: "column", next: "next_column_scale" },
      start: (i) => `in_block + ${i} % ${tile.columns}u`,
      value: (i, start, at) => {
        const group = k.groups > 1 ? `${at} + ${i} / ${tile.columns}u * ${k.groupK}u` : at;
        return scaleAt(frame, code, group, start);
      },
      put: (i, value) => {
        const column = `${i} % ${tile.columns}u`;
        const at = `${column} / ${threadColumns}u * ${k.groups}u + ${i} / ${tile.columns}u`;
        return `column_scales[buffer_x + ${column} % ${threadColumns}u][${at}] = f32(${value});`;
      },
    }],
    own: [],
    products: unroll
      ? times(k.groups, (group) => groupProducts(frame, m, `${group}u`, `${group * groupWords}u`))
      : `for (var group = 0u; group < ${k.groups}u; group++) {
${groupProducts(frame, m, "group", `group * ${groupWords}u`)}
}`,
  };
}

/**
 * Products of a group: a word at a time, as a thread reads 16 bytes best.
 *
 * @param group WGSL of which it is, and of its first word
 */
function groupProducts(
  { kernel: { tile }, k, pieces }: PrefillFrame,
  m: number,
  group: string,
  first: string,
): string {
  const reads = (name: string, from: string, count: number, stride: number, at: string) =>
    times(count, (n) => `let ${name}${n} = ${from}[${n * stride}u + ${at}];`);
  const { start, toFloat } = int8Sum(m * k.groupK);
  const word = (w: number) =>
    `{
${reads("a", "tile_x[buffer_y + ty]", tile.patchRows, pieces.row, `${w}u + ${first}`)}
${
      times(m, (c) => {
        const at = `${c * pieces.row + w}u + ${first}`;
        return `{
${reads("b", "tile_w[buffer_x + tx]", tile.patchColumns, pieces.column, at)}
${
          times(4, (e) =>
            eachOutput(tile, (r, n) => {
              const dot = `dot_int8(a${r}.${"xyzw"[e]}, b${n}.${"xyzw"[e]})`;
              const begins = w === 0 && c === 0 && e === 0;
              return `sum${r}_${n} = ${dot} + ${begins ? start : `sum${r}_${n}`};`;
            }))
        }
}`;
      })
    }
}`;
  return `${times(k.groupK / INT8_WORD_K, word)}
{
${reads("row_scale", "row_scales[buffer_y + ty]", tile.patchRows, k.groups, group)}
${reads("scale", "column_scales[buffer_x + tx]", tile.patchColumns, k.groups, group)}
${
    eachOutput(
      tile,
      (r, c) =>
        `acc${r}_${c} = fma(scale${c} * row_scale${r}, ${toFloat(`sum${r}_${c}`)}, acc${r}_${c});`,
    )
  }
}`;
}
