/**
 * WGSL that puts the partial sums of a decode kernel together: the splits of a slice one after the
 * other, then the slices one after the other, and stores the result.
 *
 * @module
 */
import type { LinearStore } from "../kernel.ts";
import { HEADER_WGSL, putWgsl } from "./wgsl.ts";

const THREADS = 256;

/** Columns of N that a workgroup sums. */
export function reduceColumns(slices: number): number {
  return THREADS / slices;
}

/** The kernel's code; dispatched over (columns of N, rows). */
export function reduceWgsl(slices: number, store: LinearStore): string {
  const columns = reduceColumns(slices);
  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> partial: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
${putWgsl(store)}
${slices > 1 ? `var<workgroup> sums: array<f32, ${THREADS}>;` : ""}

@compute @workgroup_size(${THREADS})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let n = workgroup.x * ${columns}u + lane % ${columns}u;
  let slice = lane / ${columns}u;
  let row = params.row_base + workgroup.y;
  let per_slice = (params.splits + ${slices - 1}u) / ${slices}u;
  let last = min((slice + 1u) * per_slice, params.splits);
  var sum = 0.0;
  if (n < params.n) {
    let step_stride = params.row_cap * params.partial_stride;
    var at = (slice * per_slice) * step_stride + workgroup.y * params.partial_stride + n;
    for (var split = slice * per_slice; split < last; split++) {
      sum += partial[at];
      at += step_stride;
    }
  }
${
    slices === 1 ? "" : `
  sums[lane] = sum;
  workgroupBarrier();
  if (slice != 0u) { return; }
  for (var i = 1u; i < ${slices}u; i++) { sum += sums[lane + i * ${columns}u]; }
`
  }
  if (n < params.n && row < range_rows()) { put(range_start() + row, n, sum); }
}
`;
}
