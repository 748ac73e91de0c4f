/**
 * WGSL of RMSNorm (Zhang and Sennrich 2019): residual float32 -> float16, a workgroup per row. Squares
 * are summed by each lane over its own columns, then by a fixed tree: a row's bits depend on the row
 * only.
 *
 * @module
 */
import { transformerWgsl } from "./inputs.ts";

const LANES = 256;
/** Columns of a lane that are in registers at a time, so that their loads are under way together. */
const HELD = 32;

/**
 * The kernel's code.
 *
 * @param gather the rows that have a request, a workgroup per output; else all rows
 */
export function rmsnormWgsl(hidden: number, epsilon: number, gather: boolean): string {
  const perLane = Math.ceil(hidden / LANES);
  const held = perLane <= HELD;
  const each = (body: (i: number) => string) =>
    Array.from({ length: perLane }, (_, i) => {
      const inside = (i + 1) * LANES <= hidden;
      return inside ? body(i) : `if (lane + ${i * LANES}u < ${hidden}u) { ${body(i)} }`;
    }).join("\n  ");
  const variables = Array.from(
    { length: perLane },
    (_, i) => `var value${i} = 0.0; var gain${i} = 0.0;`,
  ).join(" ");
  return transformerWgsl(/* wgsl */ `
@group(0) @binding(0) var<storage, read> residual: array<f32>; // (rows, hidden)
@group(0) @binding(1) var<storage, read> weight: array<f32>; // (hidden)
@group(0) @binding(2) var<storage, read_write> normed: array<f16>; // (rows or outputs, hidden)
${gather ? "@group(0) @binding(3) var<storage, read> output_rows: array<u32>;" : ""}

var<workgroup> sums: array<f32, ${LANES}>;

@compute @workgroup_size(${LANES})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let source = ${gather ? "output_rows[workgroup.x]" : "workgroup.x"} * ${hidden}u + lane;
  let place = workgroup.x * ${hidden}u + lane;
  var sum = 0.0;
${
    held
      ? `  ${variables}
  ${each((i) => `value${i} = residual[source + ${i * LANES}u];`)}
  ${each((i) => `gain${i} = weight[lane + ${i * LANES}u];`)}
  ${each((i) => `sum += value${i} * value${i};`)}`
      : `  for (var column = lane; column < ${hidden}u; column += ${LANES}u) {
    let value = residual[source - lane + column];
    sum += value * value;
  }`
  }
  sums[lane] = sum;
  for (var width = ${LANES / 2}u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (lane < width) {
      sums[lane] += sums[lane + width];
    }
  }
  workgroupBarrier();
  let scale = 1.0 / sqrt(sums[0] / ${hidden}.0 + ${epsilon.toExponential()});
${
    held
      ? `  ${each((i) => `normed[place + ${i * LANES}u] = to_f16(value${i} * scale * gain${i});`)}`
      : `  for (var column = lane; column < ${hidden}u; column += ${LANES}u) {
    let at = column - lane;
    normed[place + at] = to_f16(residual[source + at] * scale * weight[column]);
  }`
  }
}
`);
}
