/**
 * WGSL that puts the partial sums of a decode kernel together: the splits of a slice one after the
 * other, then the slices one after the other, and stores or finishes the result.
 *
 * @module
 */
import type { LinearStore } from "../kernel.ts";
import type { PairFinish } from "./types.ts";
import { HEADER_WGSL, putWgsl, times } from "./wgsl.ts";

const THREADS = 256;
/** Loads under way together. */
const UNROLL = 8;

/** Step, params, partial sums, output; those of a finish come behind them. */
export const REDUCE_BINDINGS = ["uniform", "uniform", "read", "write"] as const;

/** Columns of N, or pairs of them, that a workgroup sums. */
export function reduceColumns(slices: number): number {
  return THREADS / slices;
}

/** The kernel's code; dispatched over (columns of N or pairs of them, rows). */
export function reduceWgsl(
  { splits, slices }: { splits: number; slices: number },
  store: LinearStore,
  finish?: PairFinish,
): string {
  const columns = reduceColumns(slices);
  const perSlice = Math.ceil(splits / slices);
  const type = finish ? "vec2<f32>" : "f32";
  const load = (at: string) =>
    finish ? `vec2<f32>(partial[${at}], partial[${at} + ${finish.half}u])` : `partial[${at}]`;
  const column = `workgroup.x * ${columns}u + lane % ${columns}u`;
  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> partial: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
${putWgsl(store)}
${finish?.code ?? ""}
${slices > 1 ? `var<workgroup> sums: array<${type}, ${THREADS}>;` : ""}

@compute @workgroup_size(${THREADS})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
${
    finish
      ? `  let pair = ${column};
  let n = pair / ${finish.half}u * ${2 * finish.half}u + pair % ${finish.half}u;`
      : `  let n = ${column};`
  }
  let slice = lane / ${columns}u;
  let row = params.row_base + workgroup.y;
  let last = min((slice + 1u) * ${perSlice}u, ${splits}u);
  var sum = ${type}();
  if (n < params.n) {
    let step_stride = params.row_cap * params.partial_stride;
    var split = slice * ${perSlice}u;
    var at = split * step_stride + workgroup.y * params.partial_stride + n;
    for (; split + ${UNROLL - 1}u < last; split += ${UNROLL}u) {
${times(UNROLL, (i) => `      let part${i} = ${load(`at + ${i}u * step_stride`)};`)}
${times(UNROLL, (i) => `      sum += part${i};`)}
      at += ${UNROLL}u * step_stride;
    }
    for (; split < last; split++) {
      sum += ${load("at")};
      at += step_stride;
    }
  }
${
    slices === 1 ? "" : `
  sums[lane] = sum;
  workgroupBarrier();
  if (slice != 0u) { return; }
${times(slices - 1, (i) => `  sum += sums[lane + ${(i + 1) * columns}u];`)}
`
  }
  if (n < params.n && row < range_rows()) { ${
    finish ? "finish" : "put"
  }(range_start() + row, n, sum); }
}
`;
}
