// Rotary position embedding (Su et al. 2021; rotate-half, as Hugging Face checkpoints have it) of
// queries, in place, and of keys, into the cache; values go into the cache as they are. A thread takes
// elements i and i + head_dim/2 of one head of one row.
//
// Keys lie (page, kv head, dim/4, position, 4) and values (page, kv head, position, dim): attention
// reads keys with a lane per position and values with a lane per dimension, both without gaps. Their
// dim is padded to a multiple of 4; the padding stays zero as it was made.

override heads: u32;
override kv_heads: u32;
override head_dim: u32;
override padded_dim: u32;

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> page_tables: array<u32>;
@group(0) @binding(3) var<storage, read> angles: array<vec2<f32>>; // (position, head_dim/2): cos, sin
@group(0) @binding(4) var<storage, read_write> qkv: array<f32>; // (rows, (heads + 2 kv_heads) head_dim)
@group(0) @binding(5) var<storage, read_write> keys: array<f16>;
@group(0) @binding(6) var<storage, read_write> values: array<f16>;

fn key_index(page: u32, kv_head: u32, slot: u32, dim: u32) -> u32 {
  let quad = (page * kv_heads + kv_head) * (padded_dim / 4u) + dim / 4u;
  return (quad * PAGE_TOKENS + slot) * 4u + dim % 4u;
}

fn value_index(page: u32, kv_head: u32, slot: u32, dim: u32) -> u32 {
  return ((page * kv_heads + kv_head) * PAGE_TOKENS + slot) * padded_dim + dim;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let half = head_dim / 2u;
  let head = id.x / half;
  let dim = id.x % half;
  if (id.y >= step.rows || head >= heads + 2u * kv_heads) {
    return;
  }
  let row = rows[id.y];
  let source = (id.y * (heads + 2u * kv_heads) + head) * head_dim + dim;
  let low = qkv[source];
  let high = qkv[source + half];
  let angle = angles[row.position * half + dim];
  let turned_low = low * angle.x - high * angle.y;
  let turned_high = high * angle.x + low * angle.y;
  if (head < heads) {
    qkv[source] = turned_low;
    qkv[source + half] = turned_high;
    return;
  }
  let page = page_tables[row.page_table + row.position / PAGE_TOKENS];
  let slot = row.position % PAGE_TOKENS;
  if (head < heads + kv_heads) {
    keys[key_index(page, head - heads, slot, dim)] = to_f16(turned_low);
    keys[key_index(page, head - heads, slot, dim + half)] = to_f16(turned_high);
  } else {
    values[value_index(page, head - heads - kv_heads, slot, dim)] = to_f16(low);
    values[value_index(page, head - heads - kv_heads, slot, dim + half)] = to_f16(high);
  }
}
