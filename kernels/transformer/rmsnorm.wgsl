// RMSNorm (Zhang and Sennrich 2019): residual float32 -> float16, a workgroup per row. Squares are
// summed by each lane over its own columns, then by a fixed tree: a row's bits depend on the row only.

override hidden: u32;
override epsilon: f32;

const LANES = 256u;

@group(0) @binding(0) var<storage, read> residual: array<f32>; // (rows, hidden)
@group(0) @binding(1) var<storage, read> weight: array<f32>; // (hidden)
@group(0) @binding(2) var<storage, read_write> normed: array<f16>; // (rows or outputs, hidden)
@group(0) @binding(3) var<storage, read> output_rows: array<u32>; // (outputs); final norm only

var<workgroup> sums: array<f32, LANES>;

fn normalize_row(from_row: u32, to_row: u32, lane: u32) {
  let source = from_row * hidden;
  var sum = 0.0;
  for (var column = lane; column < hidden; column += LANES) {
    let value = residual[source + column];
    sum += value * value;
  }
  sums[lane] = sum;
  for (var width = LANES / 2u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (lane < width) {
      sums[lane] += sums[lane + width];
    }
  }
  workgroupBarrier();
  let scale = 1.0 / sqrt(sums[0] / f32(hidden) + epsilon);
  for (var column = lane; column < hidden; column += LANES) {
    normed[to_row * hidden + column] = to_f16(residual[source + column] * scale * weight[column]);
  }
}

// All rows of the step: a workgroup per row.
@compute @workgroup_size(LANES)
fn all_rows(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  normalize_row(workgroup.x, workgroup.x, lane);
}

// The rows that have a request, gathered: a workgroup per output.
@compute @workgroup_size(LANES)
fn gather_outputs(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  normalize_row(output_rows[workgroup.x], workgroup.x, lane);
}
