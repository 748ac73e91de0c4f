// Between frames and the residual: float16 rows as a stage sends them, float32 rows as it works on them.

override hidden: u32;

@group(0) @binding(0) var<uniform> step: Step;

@group(0) @binding(1) var<storage, read> frame_in: array<f16>; // (rows, hidden)
@group(0) @binding(2) var<storage, read_write> residual_out: array<f32>; // (rows, hidden)

@compute @workgroup_size(64)
fn import_rows(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.y < step.rows && id.x < hidden) {
    residual_out[id.y * hidden + id.x] = f32(frame_in[id.y * hidden + id.x]);
  }
}

@group(0) @binding(1) var<storage, read> residual_in: array<f32>; // (rows, hidden)
@group(0) @binding(2) var<storage, read_write> frame_out: array<f16>; // (rows, hidden)

// The residual was rounded to float16 at the end of the last layer: nothing is lost here.
@compute @workgroup_size(64)
fn export_rows(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.y < step.rows && id.x < hidden) {
    frame_out[id.y * hidden + id.x] = to_f16(residual_in[id.y * hidden + id.x]);
  }
}
