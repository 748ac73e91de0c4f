/**
 * WGSL of the decode kernel of dense float16 matrices: one thread holds a few rows of N, one workgroup a
 * row block and a split of K, for up to sixteen rows of the step at once. Products are summed in
 * float32, by rising K, through a split; splits as `reduce_wgsl.ts` says.
 *
 * @module
 */
import { DENSE_K_ALIGN, DENSE_OCTET, DENSE_ROW_BLOCK, DENSE_TILE_K } from "./order.ts";
import type { Batch, Target } from "./wgsl.ts";
import { batchLanes, batchRowsWgsl, HEADER_WGSL, putWgsl, spread, times } from "./wgsl.ts";

/** What a decode kernel of a dense matrix is generated from. */
export interface DenseKernel {
  batch: Batch;
  /** Rows of N a thread holds, at least 2 from {@linkcode TALL_BATCH} on. */
  rowsPerThread: 1 | 2 | 4;
  target: Target;
}

const OCTETS_PER_TURN = DENSE_K_ALIGN / DENSE_OCTET;

/** From this batch on reading activations takes longer than weights: one that is read serves two rows. */
const TALL_BATCH = 8;
/** Workgroup memory for activations: so much that many workgroups have room side by side. */
const TILE_BYTES = 4096;

/** K whose activations a workgroup holds at a time. */
function tileK(batch: Batch): number {
  return Math.min(DENSE_TILE_K, TILE_BYTES / 4 / batch);
}

/** Workgroup memory of the kernel: a tile of activations. */
export function denseKernelBytes(batch: Batch): number {
  return tileK(batch) * 4 * batch;
}

/** The kernel's code. */
export function denseKernelWgsl({ batch, target, ...kernel }: DenseKernel): string {
  const rowsPerThread = Math.max(kernel.rowsPerThread, batch < TALL_BATCH ? 1 : 2);
  const lanes = batchLanes(batch);
  const vector = lanes.type("f32");
  const threads = DENSE_ROW_BLOCK / rowsPerThread;
  const tile = tileK(batch);

  const fill = times(lanes.vectors, (j) => {
    const loads = Array.from(
      { length: lanes.lanes },
      (_, l) => `f32(x[x${j * lanes.lanes + l} + at])`,
    );
    return `var v${j} = ${vector}(0.0);
      if (at < params.k) { v${j} = ${vector}(${loads.join(", ")}); }
      activations${j}[i / ${DENSE_K_ALIGN}u][i % ${DENSE_K_ALIGN}u] = v${j};`;
  });

  const products = times(
    OCTETS_PER_TURN,
    (o) =>
      times(4, (pair) =>
        "{\n" +
        times(lanes.vectors, (j) => {
          const at = o * DENSE_OCTET + pair * 2;
          return `let x${j} = activations${j}[turn][${at}u]; let z${j} = activations${j}[turn][${
            at + 1
          }u];`;
        }) +
        times(rowsPerThread, (r) =>
          `{ let w = unpack2x16float(w${o}_${r}.${"xyzw"[pair]});\n` +
          times(lanes.vectors, (j) =>
            `acc${r}_${j} = fma(${vector}(w.x), x${j}, acc${r}_${j});
           acc${r}_${j} = fma(${vector}(w.y), z${j}, acc${r}_${j});`) +
          " }") +
        " }"),
  );

  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<f16>;
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
${
    times(lanes.vectors, (j) =>
      `var<workgroup> activations${j}: array<array<${vector}, ${DENSE_K_ALIGN}>, ${
        tile / DENSE_K_ALIGN
      }>;`)
  }
${target === "partial" ? "" : putWgsl(target)}

@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let block = workgroup.x;
  let split = workgroup.y;
${batchRowsWgsl(batch)}
${times(rowsPerThread, (r) => times(lanes.vectors, (j) => `  var acc${r}_${j} = ${vector}(0.0);`))}
  let octets = (params.k + ${DENSE_K_ALIGN - 1}u) / ${DENSE_K_ALIGN}u * ${OCTETS_PER_TURN}u;
  let end = min((split + 1u) * params.split_units * ${DENSE_TILE_K}u, octets * ${DENSE_OCTET}u);
  for (var k = split * params.split_units * ${DENSE_TILE_K}u; k < end; k += ${tile}u) {
    workgroupBarrier();
    ${spread(tile, threads, true, `let at = k + i;\n${fill}`)}
    workgroupBarrier();
    let octet0 = k / ${DENSE_OCTET}u;
    let count = min(${tile / DENSE_OCTET}u, octets - octet0);
    var at = (block * octets + octet0) * ${DENSE_ROW_BLOCK}u + lane;
    for (var turn = 0u; turn < count / ${OCTETS_PER_TURN}u; turn++) {
${
    times(OCTETS_PER_TURN, (o) =>
      times(rowsPerThread, (r) =>
        `      let w${o}_${r} = weights[at + ${o * DENSE_ROW_BLOCK + r * threads}u];`))
  }
${products}
      at += ${OCTETS_PER_TURN * DENSE_ROW_BLOCK}u;
    }
  }
${times(rowsPerThread, (r) => storeRow(r, batch, threads, target))}
}
`;
}

/** The sums of row `r` of a thread. */
function storeRow(r: number, batch: Batch, threads: number, target: Target): string {
  const lanes = batchLanes(batch);
  const n = `let n = block * ${DENSE_ROW_BLOCK}u + ${r * threads}u + lane;`;
  const store = (b: number) =>
    target === "partial"
      ? `y[(split * params.row_cap + workgroup.z * ${batch}u + ${b}u) * params.partial_stride + n]` +
        ` = ${lanes.lane(`acc${r}_`, b)};`
      : `if (n < params.n) { put(range_start() + first + ${b}u, n, ${
        lanes.lane(`acc${r}_`, b)
      }); }`;
  return `  { ${n}\n` + times(batch, (b) => `    if (first + ${b}u < rows) { ${store(b)} }`) + " }";
}
