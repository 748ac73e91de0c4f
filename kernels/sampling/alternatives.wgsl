// The most probable tokens of a row, in order: first of every chunk, then of the row.

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> requests: array<Request>;
@group(0) @binding(3) var<storage, read_write> states: array<RowState>;
@group(0) @binding(5) var<storage, read_write> results: array<u32>;
/** (rows, chunks, MAX_ALTERNATIVES): key and token; key 0 where the chunk has no more tokens. */
@group(0) @binding(7) var<storage, read_write> candidates: array<vec2<u32>>;

const ABOVE_ALL = vec2<u32>(0xffffffffu, 0u);

@compute @workgroup_size(WORKGROUP)
fn chunk_alternatives(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let chunk = workgroup.x;
  let row = workgroup.y;
  var last = ABOVE_ALL;
  for (var rank = 0u; rank < requests[row].alternatives; rank++) {
    var mine = vec2<u32>(0u, NO_TOKEN);
    for (var i = 0u; i < 8u; i++) {
      let token = token_at(chunk, thread, i);
      if (token < vocab) {
        let candidate = vec2<u32>(ordered(logits[offset + row * stride + token]), token);
        if (better(last, candidate) && better(candidate, mine)) { mine = candidate; }
      }
    }
    last = best_of_workgroup(thread, mine);
    if (thread == 0u) { candidates[(row * chunks + chunk) * MAX_ALTERNATIVES + rank] = last; }
  }
}

@compute @workgroup_size(WORKGROUP)
fn row_alternatives(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = workgroup.x;
  let wanted = requests[row].alternatives;
  let state = states[row];
  let log_sum = log(state.sum);
  var last = ABOVE_ALL;
  for (var rank = 0u; rank < wanted; rank++) {
    var mine = vec2<u32>(0u, NO_TOKEN);
    for (var chunk = thread; chunk < chunks; chunk += WORKGROUP) {
      for (var i = 0u; i <= rank; i++) {
        let candidate = candidates[(row * chunks + chunk) * MAX_ALTERNATIVES + i];
        if (better(last, candidate) && better(candidate, mine)) { mine = candidate; }
      }
    }
    last = best_of_workgroup(thread, mine);
    if (thread == 0u) {
      let at = row * RESULT_WORDS + RESULT_ALTERNATIVES + rank;
      results[at] = last.y;
      results[at + MAX_ALTERNATIVES] = bitcast<u32>(unordered(last.x) - state.largest - log_sum);
    }
  }
}
