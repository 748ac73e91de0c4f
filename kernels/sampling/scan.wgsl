// The largest logit and the log-sum-exp of every row; with them greedy rows and scores are done.

/** Of one chunk: the largest logit's key and token, the sum of exp(logit - largest), finite or not. */
struct Partial {
  key: u32,
  token: u32,
  sum: f32,
  status: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> requests: array<Request>;
@group(0) @binding(2) var<storage, read_write> partials: array<Partial>;
@group(0) @binding(3) var<storage, read_write> states: array<RowState>;
@group(0) @binding(5) var<storage, read_write> results: array<u32>;

var<workgroup> sums: array<f32, WORKGROUP>;
var<workgroup> statuses: array<u32, WORKGROUP>;

/** Sum and worst status of the workgroup, always added in the same order, for thread 0. */
fn gather(thread: u32, sum: f32, status: u32) {
  sums[thread] = sum;
  statuses[thread] = status;
  workgroupBarrier();
  if (thread < 16u) { fold(thread, 16u, WORKGROUP); }
  workgroupBarrier();
  if (thread == 0u) { fold(0u, 1u, 16u); }
}

fn fold(first: u32, step: u32, end: u32) {
  for (var at = first + step; at < end; at += step) {
    sums[first] = sums[first] + sums[at];
    statuses[first] = max(statuses[first], statuses[at]);
  }
}

@compute @workgroup_size(WORKGROUP)
fn scan(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let chunk = workgroup.x;
  let row = workgroup.y;
  let base = offset + row * stride;
  var mine = vec2<u32>(0u, NO_TOKEN);
  var status = FINITE;
  for (var i = 0u; i < 8u; i++) {
    let token = token_at(chunk, thread, i);
    if (token < vocab) {
      let logit = logits[base + token];
      if (!is_finite(logit)) { status = NOT_FINITE; }
      let candidate = vec2<u32>(ordered(logit), token);
      if (better(candidate, mine)) { mine = candidate; }
    }
  }
  let best = best_of_workgroup(thread, mine);
  let largest = unordered(best.x);
  var sum = 0.0;
  for (var i = 0u; i < 8u; i++) {
    let token = token_at(chunk, thread, i);
    if (token < vocab) { sum = sum + exp(logits[base + token] - largest); }
  }
  gather(thread, sum, status);
  if (thread == 0u) {
    partials[row * chunks + chunk] = Partial(best.x, best.y, sums[0], statuses[0]);
  }
}

@compute @workgroup_size(WORKGROUP)
fn combine(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = workgroup.x;
  let request = requests[row];
  var mine = vec2<u32>(0u, NO_TOKEN);
  for (var chunk = thread; chunk < chunks; chunk += WORKGROUP) {
    let part = partials[row * chunks + chunk];
    let candidate = vec2<u32>(part.key, part.token);
    if (better(candidate, mine)) { mine = candidate; }
  }
  let best = best_of_workgroup(thread, mine);
  let largest = unordered(best.x);
  var sum = 0.0;
  var status = FINITE;
  for (var chunk = thread; chunk < chunks; chunk += WORKGROUP) {
    let part = partials[row * chunks + chunk];
    sum = sum + part.sum * exp(unordered(part.key) - largest);
    status = max(status, part.status);
  }
  gather(thread, sum, status);
  if (thread != 0u) { return; }

  let log_sum = log(sums[0]);
  let token = select(best.y, request.token, request.mode == MODE_SCORE);
  let at = row * RESULT_WORDS;
  results[at] = statuses[0];
  results[at + 1u] = token;
  results[at + 2u] = bitcast<u32>(logits[offset + row * stride + token] - largest - log_sum);
  results[at + 3u] = bitcast<u32>(largest + log_sum);

  var state = RowState();
  state.largest = largest;
  state.token = best.y;
  state.sum = sums[0];
  state.shift = 24u;
  state.left_k = request.top_k;
  states[row] = state;
}
