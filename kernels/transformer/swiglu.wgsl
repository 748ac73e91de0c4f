// SwiGLU (Shazeer 2020): silu(gate) * up, float32 -> float16.

override width: u32;

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> gate_up: array<f32>; // (rows, 2 width): gate, then up
@group(0) @binding(2) var<storage, read_write> gated: array<f16>; // (rows, width)

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let column = id.x;
  let row = id.y;
  if (row >= step.rows || column >= width) {
    return;
  }
  let gate = gate_up[row * 2u * width + column];
  let up = gate_up[row * 2u * width + width + column];
  // exp of less than -80 changes no bit of the sum, of more than 80 would leave float32's range.
  let silu = gate / (1.0 + exp(clamp(-gate, -80.0, 80.0)));
  gated[row * width + column] = to_f16(silu * up);
}
