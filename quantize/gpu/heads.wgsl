// Between rows of activations and heads: queries of the heads that share a KV head lie together,
// (sequences, kv heads, tokens * group, head size), so that attention is a batch of plain products.
// Rotary embedding (rotate-half) is applied on the way in, and its transpose on the way back.

struct Params {
  tokens: u32, // per sequence
  sequences: u32,
  kv_heads: u32,
  group: u32, // query heads per KV head
  head_size: u32,
  unused_0: u32,
  unused_1: u32,
  unused_2: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> angles: array<vec2<f32>>; // (tokens, head size / 2) cos, sin
@group(0) @binding(2) var<storage, read_write> rows: array<f32>; // q | k | v, or heads' outputs
@group(0) @binding(3) var<storage, read_write> queries: array<f32>;
@group(0) @binding(4) var<storage, read_write> keys: array<f32>;
@group(0) @binding(5) var<storage, read_write> values: array<f32>;

const LINE = 32768u;

struct Place {
  row: u32, // first element of the pair in `rows`
  packed: u32, // and in its packed buffer
  angle: u32,
  part: u32, // 0 query, 1 key, 2 value, 3 beyond the end
}

// Thread -> a pair of elements, half a head apart.
fn place(index: u32) -> Place {
  let half = p.head_size / 2u;
  let heads = p.kv_heads * (p.group + 2u);
  let pair = index % half;
  let head = (index / half) % heads;
  let row = index / half / heads;
  if (row >= p.sequences * p.tokens) {
    return Place(0u, 0u, 0u, 3u);
  }
  let token = row % p.tokens;
  let sequence = row / p.tokens;
  let at = (row * heads + head) * p.head_size + pair;
  let angle = token * half + pair;
  let query_heads = p.kv_heads * p.group;
  if (head < query_heads) {
    let batch = sequence * p.kv_heads + head / p.group;
    let to = ((batch * p.tokens + token) * p.group + head % p.group) * p.head_size + pair;
    return Place(at, to, angle, 0u);
  }
  let kv = (head - query_heads) % p.kv_heads;
  let to = ((sequence * p.kv_heads + kv) * p.tokens + token) * p.head_size + pair;
  return Place(at, to, angle, select(2u, 1u, head < query_heads + p.kv_heads));
}

@compute @workgroup_size(256)
fn pack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = place((group.x + group.y * LINE) * 256u + lane);
  let half = p.head_size / 2u;
  if (at.part > 2u) {
    return;
  }
  let low = rows[at.row];
  let high = rows[at.row + half];
  let turn = angles[at.angle];
  let first = low * turn.x - high * turn.y;
  let second = high * turn.x + low * turn.y;
  if (at.part == 0u) {
    queries[at.packed] = first;
    queries[at.packed + half] = second;
  } else if (at.part == 1u) {
    keys[at.packed] = first;
    keys[at.packed + half] = second;
  } else {
    values[at.packed] = low;
    values[at.packed + half] = high;
  }
}

@compute @workgroup_size(256)
fn pack_back(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = place((group.x + group.y * LINE) * 256u + lane);
  let half = p.head_size / 2u;
  if (at.part > 2u) {
    return;
  }
  if (at.part == 2u) {
    rows[at.row] = values[at.packed];
    rows[at.row + half] = values[at.packed + half];
    return;
  }
  var first = queries[at.packed];
  var second = queries[at.packed + half];
  if (at.part == 1u) {
    first = keys[at.packed];
    second = keys[at.packed + half];
  }
  let turn = angles[at.angle];
  rows[at.row] = first * turn.x + second * turn.y;
  rows[at.row + half] = second * turn.x - first * turn.y;
}

// Where an element of the heads' outputs (rows, query heads * head size) lies packed.
fn packed_output(index: u32) -> u32 {
  let heads = p.kv_heads * p.group;
  let element = index % p.head_size;
  let head = (index / p.head_size) % heads;
  let row = index / p.head_size / heads;
  let batch = (row / p.tokens) * p.kv_heads + head / p.group;
  return ((batch * p.tokens + row % p.tokens) * p.group + head % p.group) * p.head_size + element;
}

@compute @workgroup_size(256)
fn unpack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * 256u + lane;
  if (at < p.sequences * p.tokens * p.kv_heads * p.group * p.head_size) {
    rows[at] = queries[packed_output(at)];
  }
}

@compute @workgroup_size(256)
fn unpack_back(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * 256u + lane;
  if (at < p.sequences * p.tokens * p.kv_heads * p.group * p.head_size) {
    queries[packed_output(at)] = rows[at];
  }
}
