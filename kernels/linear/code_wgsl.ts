/**
 * WGSL of the decode kernels of CodeGEMM matrices on software adapters, and of wide codes on any: one
 * thread holds a few rows of N, one workgroup a row block and a split of K, for up to eight rows of
 * the step at once.
 *
 * Two families, which differ in what happens per code:
 *
 * - `codegemm` (arXiv 2512.17970): Psumbooks, the inner products of all 256 centroids with the
 *   activations at a position, are made in workgroup memory; a code gathers its partial sum.
 * - `dequantize`: a code gathers its centroid, which is multiplied with the activations. Codes of more
 *   than 8 bits always: a Psumbook of theirs would cost more than the weights.
 *
 * The order of one row's sum, which no batch size, turn or stage changes: within a group of positions
 * in float16; groups then with their scale in float32, through a split of K; splits as `reduce_wgsl.ts`
 * says. Products are summed in two chains, of the even and of the odd elements: those of a vector in the
 * `codegemm` family, whose chains are then added and make one chain by position and by codebook; those
 * of the group in the `dequantize` family, whose chains are added in float32. `psumbook_wgsl.ts` and
 * `dequantize_wgsl.ts` have the same orders.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { CodeKernel } from "./code_kernel.ts";
import { codeKernelFits } from "./code_kernel.ts";
import { rolledDequantize, rolledPsumbook } from "./code_rolled_wgsl.ts";
import { centroidType, unrolledDequantize } from "./code_unrolled_wgsl.ts";
import { familyOrder } from "./order.ts";
import type { BatchLanes } from "./wgsl.ts";
import { batchLanes, batchRowsWgsl, HEADER_WGSL, putWgsl, times } from "./wgsl.ts";

/** The kernel's code; dispatched over (row blocks, splits, batches of rows). */
export function codeKernelWgsl(kernel: CodeKernel): string {
  const { format, order, threads, rowsPerThread, batch, target, family, unroll } = kernel;
  const vectorInput = unroll && kernel.vectorInput;
  const workgroups = order.rowBlock / (threads * rowsPerThread);
  invariant(Number.isInteger(workgroups), "workgroups cover a row block");
  invariant(codeKernelFits(kernel), "the kernel fits into workgroup memory");
  invariant(
    family === "dequantize" || (format.b === 8 && !unroll),
    "Psumbooks here are made in loops, with an entry for each byte",
  );
  const lanes = batchLanes(batch);
  const turns = familyOrder(order, family).unitPositions / kernel.turnPositions;
  const make = unroll
    ? unrolledDequantize
    : family === "codegemm"
    ? rolledPsumbook
    : rolledDequantize;
  const body = make(kernel, lanes);

  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<${vectorInput ? "vec4<f16>" : "f16"}>;
@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> codebooks: array<${unroll ? centroidType(kernel) : "f16"}>;
@group(0) @binding(5) var<storage, read> scales: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> y: array<${
    target === "partial" ? "vec4<f32>" : "f32"
  }>;
${body.declarations}
${target === "partial" ? "" : putWgsl(target)}

@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let block = workgroup.x / ${workgroups}u;
  // The first four rows of N of this thread within the row block, in fours.
  let quad = (workgroup.x % ${workgroups}u) * ${threads * rowsPerThread / 4}u + lane;
  let split = workgroup.y;
  let book = book_of(block);
${batchRowsWgsl(batch)}
${
    times(rowsPerThread, (r) =>
      times(lanes.vectors, (j) => `  var acc${r}_${j} = ${lanes.type("f32")}(0.0);`))
  }
  let scale_block = block * (params.k / ${format.g}u);
  let end = min((split + 1u) * params.split_units, params.units) * ${turns}u;
  let first_turn = split * params.split_units * ${turns}u;
  let block_turns = block * params.units * ${turns}u;
${body.prologue}
  for (var turn = first_turn; turn < end; turn++) {
    let turn_at = block_turns + turn;
${body.turn}
  }
${target === "partial" ? storePartial(kernel, lanes) : storeDirect(kernel, lanes)}
}
`;
}

/** Partial sums: `[split][row][n]`, padded rows of N included. */
function storePartial(kernel: CodeKernel, lanes: BatchLanes): string {
  const { batch, rowsPerThread, threads, order } = kernel;
  return times(batch, (b) =>
    `  if (first + ${b}u < rows) {
    let row = split * params.row_cap + workgroup.z * ${batch}u + ${b}u;
    let at = (row * params.partial_stride + block * ${order.rowBlock}u) / 4u + quad;
${
      times(rowsPerThread / 4, (t) =>
        `    y[at + ${t * threads}u] = vec4<f32>(${
          [0, 1, 2, 3].map((r) => lanes.lane(`acc${4 * t + r}_`, b)).join(", ")
        });`)
    }
  }`);
}

function storeDirect(kernel: CodeKernel, lanes: BatchLanes): string {
  const { batch, rowsPerThread, threads, order } = kernel;
  return times(rowsPerThread, (r) =>
    `  {
    let n = block * ${order.rowBlock}u + (quad + ${(r >> 2) * threads}u) * 4u + ${r & 3}u;
    if (n < params.n) {
${
      times(batch, (b) =>
        `      if (first + ${b}u < rows) { put(range_start() + first + ${b}u, n, ${
          lanes.lane(`acc${r}_`, b)
        }); }`)
    }
    }
  }`);
}
