// Rows of the embedding table become the residual. The table may be cut into pieces of whole rows (a
// binding holds only so much): each piece runs over all rows and writes those whose token it holds.

override hidden: u32;
override first_token: u32;
override tokens: u32;

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> table: array<f16>; // (tokens, hidden)
@group(0) @binding(3) var<storage, read_write> residual: array<f32>; // (rows, hidden)

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let column = id.x;
  let row = id.y;
  if (row >= step.rows || column >= hidden) {
    return;
  }
  let token = rows[row].token;
  if (token < first_token || token - first_token >= tokens) {
    return;
  }
  residual[row * hidden + column] = f32(table[(token - first_token) * hidden + column]);
}
