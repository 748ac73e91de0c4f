// Gumbel-max: the token with the largest (logit - largest) / temperature + Gumbel noise is a draw from
// the softmax at that temperature (Gumbel 1954; "the Gumbel-max trick"). The noise of a token is a
// function of seed, choice, position and token alone: Philox4x32-10, the counter-based generator of
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> requests: array<Request>;
/** (rows, chunks): the best score's key and its token. */
@group(0) @binding(2) var<storage, read_write> drawn: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> states: array<RowState>;
@group(0) @binding(5) var<storage, read_write> results: array<u32>;

/** (high, low) words of a * b. */
fn multiply(a: u32, b: u32) -> vec2<u32> {
  let a0 = a & 0xffffu;
  let a1 = a >> 16u;
  let b0 = b & 0xffffu;
  let b1 = b >> 16u;
  let middle = a1 * b0 + ((a0 * b0) >> 16u);
  let carry = a0 * b1 + (middle & 0xffffu);
  return vec2<u32>(a1 * b1 + (middle >> 16u) + (carry >> 16u), a * b);
}

fn philox(start: vec4<u32>, seed: vec2<u32>) -> vec4<u32> {
  var counter = start;
  var key = seed;
  for (var round = 0u; round < 10u; round++) {
    let p0 = multiply(0xd2511f53u, counter.x);
    let p1 = multiply(0xcd9e8d57u, counter.z);
    counter = vec4<u32>(p1.x ^ counter.y ^ key.x, p1.y, p0.x ^ counter.w ^ key.y, p0.y);
    key = key + vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
  }
  return counter;
}

/**
 * -log(-log(1 - t)) for the uniform t in (0, 1) that 32 random bits stand for. A token far down the
 * tail is drawn when its t is tiny, so small t are made from 64 bits (down to 2^-65), and
 * -log(1 - t) for them from its series, which keeps all digits.
 */
fn gumbel(bits: u32, token: u32, request: Request) -> f32 {
  var t = (f32(bits) + 0.5) * 0x1p-32;
  if (bits < 256u) {
    let counter = vec4<u32>(token, request.position, request.choice, 1u);
    let more = philox(counter, vec2<u32>(request.seed_low, request.seed_high)).x;
    t = f32(bits) * 0x1p-32 + (f32(more) + 0.5) * 0x1p-64;
  }
  t = min(t, 0x1.fffffep-1);
  let series = t * (1.0 + t * (0.5 + t * (0.33333334 + t * 0.25)));
  return -log(select(-log(1.0 - t), series, t < 0.015625));
}

@compute @workgroup_size(WORKGROUP)
fn draw(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let chunk = workgroup.x;
  let row = workgroup.y;
  let request = requests[row];
  if (request.mode != MODE_DRAW) { return; }
  let largest = states[row].largest;
  let threshold = max(states[row].key_k, states[row].key_p);
  let seed = vec2<u32>(request.seed_low, request.seed_high);
  var mine = vec2<u32>(0u, NO_TOKEN);
  for (var run = 0u; run < 2u; run++) {
    let first = token_at(chunk, thread, 4u * run);
    let bits = philox(vec4<u32>(first >> 2u, request.position, request.choice, 0u), seed);
    for (var i = 0u; i < 4u; i++) {
      let token = first + i;
      if (token < vocab) {
        let logit = logits[offset + row * stride + token];
        if (ordered(logit) >= threshold) {
          let noise = gumbel(bits[i], token, request);
          let score = (logit - largest) * request.inverse_temperature + noise;
          let candidate = vec2<u32>(ordered(score), token);
          if (better(candidate, mine)) { mine = candidate; }
        }
      }
    }
  }
  let best = best_of_workgroup(thread, mine);
  if (thread == 0u) { drawn[row * chunks + chunk] = best; }
}

@compute @workgroup_size(WORKGROUP)
fn pick(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = workgroup.x;
  if (requests[row].mode != MODE_DRAW) { return; }
  var mine = vec2<u32>(0u, NO_TOKEN);
  for (var chunk = thread; chunk < chunks; chunk += WORKGROUP) {
    let candidate = drawn[row * chunks + chunk];
    if (better(candidate, mine)) { mine = candidate; }
  }
  let best = best_of_workgroup(thread, mine);
  if (thread != 0u || best.y == NO_TOKEN) { return; }
  let logit = logits[offset + row * stride + best.y];
  let state = states[row];
  results[row * RESULT_WORDS + 1u] = best.y;
  results[row * RESULT_WORDS + 2u] = bitcast<u32>(logit - state.largest - log(state.sum));
}
