// Bias and penalties: each entry adds to one logit, and no logit has two entries.

struct Adjustment {
  /** row * stride + token */
  at: u32,
  delta: f32,
}

struct Adjustments {
  count: u32,
  unused: u32,
  entries: array<Adjustment>,
}

@group(0) @binding(0) var<storage, read_write> logits: array<f32>;
@group(0) @binding(6) var<storage, read> adjustments: Adjustments;

@compute @workgroup_size(WORKGROUP)
fn adjust(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= adjustments.count) { return; }
  let entry = adjustments.entries[id.x];
  let at = offset + entry.at;
  logits[at] = logits[at] + entry.delta;
}
