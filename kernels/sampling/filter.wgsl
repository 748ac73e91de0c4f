// top_k and top_p as thresholds on the logit, found by radix selection over the bits of the float,
// eight at a time from the top: a histogram of the tokens that share the digits found so far, then the
// digit at which the wanted count or mass is reached. Four rounds give the exact threshold.
//
// Probabilities are summed as integers, so the sum does not depend on its order: exp((logit -
// largest) / temperature) in units of 2^-39, as three numbers of 13 bits that are summed apart (for
// fewer than 2^19 tokens no sum overflows). What is cut off is below 2^-20 of the largest
// probability over the whole row.

const LIMB = 8192.0;

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> requests: array<Request>;
@group(0) @binding(3) var<storage, read_write> states: array<RowState>;
/** (rows, 256 digits, count and three limbs of mass); zero between steps. */
@group(0) @binding(4) var<storage, read_write> histograms: array<atomic<u32>>;

fn filtered(request: Request) -> bool {
  return request.mode == MODE_DRAW && (request.top_k > 0u || request.top_p < 1.0);
}

var<workgroup> counts: array<atomic<u32>, 256>;
var<workgroup> limbs: array<atomic<u32>, 768>;

@compute @workgroup_size(WORKGROUP)
fn histogram(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let chunk = workgroup.x;
  let row = workgroup.y;
  let request = requests[row];
  if (!filtered(request)) { return; }
  let largest = states[row].largest;
  let shift = states[row].shift;
  let key_k = states[row].key_k;
  let key_p = states[row].key_p;
  let found = 0xffffff00u << shift;

  atomicStore(&counts[thread], 0u);
  atomicStore(&limbs[thread], 0u);
  atomicStore(&limbs[thread + 256u], 0u);
  atomicStore(&limbs[thread + 512u], 0u);
  workgroupBarrier();
  for (var i = 0u; i < 8u; i++) {
    let token = token_at(chunk, thread, i);
    if (token < vocab) {
      let logit = logits[offset + row * stride + token];
      let key = ordered(logit);
      let digit = (key >> shift) & 255u;
      if (request.top_k > 0u && (key & found) == key_k) { atomicAdd(&counts[digit], 1u); }
      if (request.top_p < 1.0 && (key & found) == key_p) {
        let high = exp((logit - largest) * request.inverse_temperature) * LIMB;
        let middle = (high - floor(high)) * LIMB;
        let low = (middle - floor(middle)) * LIMB;
        atomicAdd(&limbs[digit], u32(high));
        atomicAdd(&limbs[digit + 256u], u32(middle));
        atomicAdd(&limbs[digit + 512u], u32(low));
      }
    }
  }
  workgroupBarrier();
  let at = (row * 256u + thread) * 4u;
  let count = atomicLoad(&counts[thread]);
  if (count > 0u) { atomicAdd(&histograms[at], count); }
  for (var limb = 0u; limb < 3u; limb++) {
    let mass = atomicLoad(&limbs[limb * 256u + thread]);
    if (mass > 0u) { atomicAdd(&histograms[at + 1u + limb], mass); }
  }
}

/** 64-bit numbers as (high, low). */
fn add64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  let low = a.y + b.y;
  return vec2<u32>(a.x + b.x + select(0u, 1u, low < a.y), low);
}

fn sub64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  return vec2<u32>(a.x - b.x - select(0u, 1u, a.y < b.y), a.y - b.y);
}

fn less64(a: vec2<u32>, b: vec2<u32>) -> bool {
  return a.x < b.x || (a.x == b.x && a.y < b.y);
}

/** high * 2^26 + middle * 2^13 + low */
fn mass64(high: u32, middle: u32, low: u32) -> vec2<u32> {
  let upper = vec2<u32>(high >> 6u, high << 26u);
  return add64(add64(upper, vec2<u32>(middle >> 19u, middle << 13u)), vec2<u32>(0u, low));
}

/** What top_p wants of a whole mass: at least the smallest unit, at most all of it. */
fn share64(whole: vec2<u32>, top_p: f32) -> vec2<u32> {
  let wanted = (f32(whole.x) * 4294967296.0 + f32(whole.y)) * top_p;
  let high = floor(wanted / 4294967296.0);
  let share = vec2<u32>(u32(high), u32(wanted - high * 4294967296.0));
  if (less64(whole, share)) { return whole; }
  if (share.x == 0u && share.y == 0u) { return vec2<u32>(0u, 1u); }
  return share;
}

/** Of every digit, and of every sixteen digits. */
var<workgroup> digit_counts: array<u32, 256>;
var<workgroup> digit_masses: array<vec2<u32>, 256>;
var<workgroup> block_counts: array<u32, 16>;
var<workgroup> block_masses: array<vec2<u32>, 16>;

@compute @workgroup_size(WORKGROUP)
fn narrow(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) digit: u32,
) {
  let row = workgroup.x;
  let request = requests[row];
  if (!filtered(request)) { return; }
  let at = (row * 256u + digit) * 4u;
  let count = atomicExchange(&histograms[at], 0u);
  let high = atomicExchange(&histograms[at + 1u], 0u);
  let middle = atomicExchange(&histograms[at + 2u], 0u);
  let low = atomicExchange(&histograms[at + 3u], 0u);
  let mass = mass64(high, middle, low);
  let state = states[row];
  digit_counts[digit] = count;
  digit_masses[digit] = mass;
  storageBarrier(); // the state is read by all before one thread changes it
  workgroupBarrier();
  if (digit < 16u) {
    var block_count = 0u;
    var block_mass = vec2<u32>(0u, 0u);
    for (var i = 16u * digit; i < 16u * digit + 16u; i++) {
      block_count = block_count + digit_counts[i];
      block_mass = add64(block_mass, digit_masses[i]);
    }
    block_counts[digit] = block_count;
    block_masses[digit] = block_mass;
  }
  workgroupBarrier();

  // Of all higher digits: those of the same block, then the blocks above.
  let block = digit >> 4u;
  var count_above = 0u;
  var mass_above = vec2<u32>(0u, 0u);
  for (var i = digit + 1u; i < 16u * block + 16u; i++) {
    count_above = count_above + digit_counts[i];
    mass_above = add64(mass_above, digit_masses[i]);
  }
  for (var i = block + 1u; i < 16u; i++) {
    count_above = count_above + block_counts[i];
    mass_above = add64(mass_above, block_masses[i]);
  }

  if (request.top_k > 0u) {
    if (count_above < state.left_k && count_above + count >= state.left_k) {
      states[row].key_k = state.key_k | (digit << state.shift);
      states[row].left_k = state.left_k - count_above;
    }
  }
  if (request.top_p < 1.0) {
    var left = vec2<u32>(state.left_p_high, state.left_p_low);
    if (state.shift == 24u) { left = share64(whole_mass(), request.top_p); }
    if (less64(mass_above, left) && !less64(add64(mass_above, mass), left)) {
      states[row].key_p = state.key_p | (digit << state.shift);
      let rest = sub64(left, mass_above);
      states[row].left_p_high = rest.x;
      states[row].left_p_low = rest.y;
    }
  }
  if (digit == 0u && state.shift > 0u) { states[row].shift = state.shift - 8u; }
}

fn whole_mass() -> vec2<u32> {
  var whole = vec2<u32>(0u, 0u);
  for (var i = 0u; i < 16u; i++) { whole = add64(whole, block_masses[i]); }
  return whole;
}
