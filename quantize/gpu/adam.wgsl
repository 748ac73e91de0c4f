// Adam (Kingma and Ba 2015), one thread per parameter. The step's factor and bias corrections change
// from step to step and come in a buffer of their own; the rate is the tensor's.

struct Params {
  count: u32,
  rate: f32,
  first: u32, // of its gradient
  unused: u32,
}
struct Step {
  factor: f32,
  correction_1: f32, // 1 / (1 - beta_1^t)
  correction_2: f32,
  unused: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> step: Step;
@group(0) @binding(2) var<storage, read> gradient: array<f32>;
@group(0) @binding(3) var<storage, read_write> parameters: array<f32>;
@group(0) @binding(4) var<storage, read_write> moments: array<vec2<f32>>;

const BETA_1 = 0.9;
const BETA_2 = 0.98;
const LINE = 32768u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * 256u + lane;
  if (at >= p.count) {
    return;
  }
  let slope = gradient[p.first + at];
  let moment = vec2(
    BETA_1 * moments[at].x + (1.0 - BETA_1) * slope,
    BETA_2 * moments[at].y + (1.0 - BETA_2) * slope * slope,
  );
  moments[at] = moment;
  let by = moment.x * step.correction_1 / (sqrt(moment.y * step.correction_2) + 1e-20);
  parameters[at] -= p.rate * step.factor * by;
}
