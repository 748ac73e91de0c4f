// Activations on their way to and from storage as float16, two to a word.

@group(0) @binding(0) var<uniform> count: vec4<u32>; // x: words
@group(0) @binding(1) var<storage, read_write> floats: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> halves: array<u32>;

const LINE = 32768u;

@compute @workgroup_size(256)
fn pack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * 256u + lane;
  if (at < count.x) {
    halves[at] = pack2x16float(clamp(floats[at], vec2(-65504.0), vec2(65504.0)));
  }
}

@compute @workgroup_size(256)
fn unpack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * 256u + lane;
  if (at < count.x) {
    floats[at] = unpack2x16float(halves[at]);
  }
}
