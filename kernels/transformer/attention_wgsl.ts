/**
 * WGSL of paged grouped-query attention, generated per head shape so that the small loops over heads
 * and dimensions are unrolled and accumulators stay in registers.
 *
 * A row at position p attends to positions 0..p of its sequence, through its page table. All that
 * orders a row's arithmetic is the head shape and constants of this file; which rows it shares a
 * workgroup or a step with changes none of its bits.
 *
 * @module
 */
import type { HeadShape } from "./kv_layout.ts";
import { PAGE_TOKENS, transformerWgsl } from "./inputs.ts";

/** Positions of a split of the context: few, so that one long context fills a large GPU. */
export const SPLIT_TOKENS = 2 * PAGE_TOKENS;

/** Lanes of a decode workgroup. */
const DECODE_LANES = 256;

/** Lanes that reduce the scores of a head. */
const SHARERS = 8;

/** Most query heads of one KV head that a decode workgroup serves. */
const MAX_HEAD_TILE = 8;

/** Loads that are under way together in loops over dimensions and positions. */
const UNROLL = 16;

/** Lanes that share a row in a prefill workgroup. */
const ROW_LANES = 16;

/** Below WebGPU's guaranteed 16 KiB of workgroup memory. */
const WORKGROUP_BYTES = 15 * 1024;

/** Query heads of one KV head that share a decode workgroup. */
export function headTile({ group, paddedDim }: HeadShape): number {
  const bytesPerHead = 4 * (paddedDim + SPLIT_TOKENS);
  const fit = Math.floor((WORKGROUP_BYTES - 4 * MAX_HEAD_TILE * SHARERS) / bytesPerHead);
  return Math.max(1, Math.min(group, MAX_HEAD_TILE, fit));
}

/** Rows of one sequence that share a prefill workgroup. */
export function tileRows({ paddedDim }: HeadShape): number {
  const bytesPerRow = 4 * (paddedDim + 2 * PAGE_TOKENS);
  return [16, 8, 4].find((rows) => rows * bytesPerRow <= WORKGROUP_BYTES) ?? 2;
}

const times = (n: number, line: (i: number) => string, separator = "\n") =>
  Array.from({ length: n }, (_, i) => line(i)).join(separator);

const headConstants = (shape: HeadShape) => `
const HEADS = ${shape.heads}u;
const KV_HEADS = ${shape.kvHeads}u;
const GROUP = ${shape.group}u;
const HEAD_DIM = ${shape.headDim}u;
const QUADS = ${shape.paddedDim / 4}u; // groups of 4 dimensions, the last one padded with zeros
const ROW_STRIDE = ${(shape.heads + 2 * shape.kvHeads) * shape.headDim}u;
const SCALE = ${1 / Math.sqrt(shape.headDim)}f;
const LOWEST = -3.0e38f;

// Four dimensions of a query, scaled; zero past the head's end.
fn query_quad(row: u32, head: u32, quad: u32) -> vec4<f32> {
  let at = row * ROW_STRIDE + head * HEAD_DIM + quad * 4u;
  if (quad * 4u + 3u < HEAD_DIM) {
    return vec4<f32>(qkv[at], qkv[at + 1u], qkv[at + 2u], qkv[at + 3u]) * SCALE;
  }
  var value = vec4<f32>();
  for (var i = 0u; i < 4u; i++) {
    if (quad * 4u + i < HEAD_DIM) {
      value[i] = qkv[at + i];
    }
  }
  return value * SCALE;
}
`;

/**
 * Decode rows, first half: a workgroup takes one row, up to {@linkcode headTile} query heads of one KV
 * head, and one split of the context ({@linkcode SPLIT_TOKENS} positions), and leaves the softmax's
 * maximum, its sum and the weighted values (Dao et al., Flash-Decoding).
 */
export function decodeSplitWgsl(shape: HeadShape): string {
  const tile = headTile(shape);
  const quads = shape.paddedDim / 4;
  const teams = DECODE_LANES / SPLIT_TOKENS;
  const perTeam = Math.ceil(tile / teams);
  const unroll = [UNROLL, 8, 4, 2, 1].find((u) => quads % u === 0)!;
  const each = SPLIT_TOKENS / SHARERS;
  return transformerWgsl(/* wgsl */ `
${headConstants(shape)}
const TILE = ${tile}u;
const TILES = ${Math.ceil(shape.group / tile)}u;
const LANES = ${DECODE_LANES}u;
const SPLIT = ${SPLIT_TOKENS}u;
const SHARERS = ${SHARERS}u;

struct Batch {
  first_row: u32,
  splits: u32, // of the longest context: the stride of partials
}

@group(0) @binding(0) var<uniform> batch: Batch;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> page_tables: array<u32>;
@group(0) @binding(3) var<storage, read> qkv: array<f32>;
@group(0) @binding(4) var<storage, read> keys: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read> values: array<vec4<f16>>;
// (rows of the batch, heads, splits, 1 + QUADS): maximum and sum, then the weighted values.
@group(0) @binding(6) var<storage, read_write> partials: array<vec4<f32>>;

var<workgroup> queries: array<vec4<f32>, ${tile * quads}>; // (TILE, QUADS)
var<workgroup> scores: array<f32, ${tile * SPLIT_TOKENS}>; // (TILE, SPLIT)
var<workgroup> reduced: array<f32, ${tile * SHARERS}>; // (TILE, SHARERS)

@compute @workgroup_size(LANES)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let row_index = batch.first_row + workgroup.z;
  let row = rows[row_index];
  let start = workgroup.x * SPLIT;
  if (start > row.position) {
    return;
  }
  let length = min(SPLIT, row.position - start + 1u);
  let kv_head = workgroup.y / TILES;
  let first_in_group = (workgroup.y % TILES) * TILE;
  let first_head = kv_head * GROUP + first_in_group;
  let heads_here = min(TILE, GROUP - first_in_group);

  for (var i = lane; i < TILE * QUADS; i += LANES) {
    if (i / QUADS < heads_here) {
      queries[i] = query_quad(row_index, first_head + i / QUADS, i % QUADS);
    }
  }
  workgroupBarrier();

  // A lane takes one position against the heads of its team.
  let position = lane % SPLIT;
  let team_head = lane / SPLIT * ${perTeam}u;
  ${times(perTeam, (h) => `var score${h} = LOWEST;`)}
  if (position < length) {
    ${times(perTeam, (h) => `score${h} = 0.0;`)}
    ${times(perTeam, (h) => `let query${h} = min(team_head + ${h}u, TILE - 1u) * QUADS;`)}
    let page = page_tables[row.page_table + (start + position) / PAGE_TOKENS];
    let at = (page * KV_HEADS + kv_head) * QUADS * PAGE_TOKENS + position % PAGE_TOKENS;
    for (var quad = 0u; quad < QUADS; quad += ${unroll}u) {
      ${times(unroll, (u) => `let key${u} = vec4<f32>(keys[at + (quad + ${u}u) * PAGE_TOKENS]);`)}
      ${
    times(unroll, (u) =>
      times(perTeam, (h) =>
        `score${h} += dot(key${u}, queries[query${h} + quad + ${u}u]);`))
  }
    }
  }
  ${
    times(perTeam, (h) =>
      `if (team_head + ${h}u < TILE) { scores[(team_head + ${h}u) * SPLIT + position] = score${h}; }`)
  }
  workgroupBarrier();

  // The softmax of each head, by its sharers: every eighth position each, then the sharers in order.
  let head = lane / SHARERS;
  let sharer = lane % SHARERS;
  let own = head * SPLIT + sharer;
  var maximum = LOWEST;
  if (head < TILE) {
    ${times(each, (i) => `maximum = max(maximum, scores[own + ${i * SHARERS}u]);`)}
    reduced[lane] = maximum;
  }
  workgroupBarrier();
  if (head < TILE) {
    ${times(SHARERS, (i) => `maximum = max(maximum, reduced[head * SHARERS + ${i}u]);`)}
  }
  workgroupBarrier();
  if (head < TILE) {
    var sum = 0.0;
    ${
    times(each, (i) =>
      `{
      let at = own + ${i * SHARERS}u;
      let weight = select(0.0, exp(scores[at] - maximum), sharer + ${i * SHARERS}u < length);
      scores[at] = weight;
      sum += weight;
    }`)
  }
    reduced[lane] = sum;
  }
  workgroupBarrier();
  if (head < heads_here && sharer == 0u) {
    var total = 0.0;
    ${times(SHARERS, (i) => `total += reduced[lane + ${i}u];`)}
    partials[partial_index(workgroup, first_head + head)] = vec4<f32>(maximum, total, 0.0, 0.0);
  }

  // The weighted values: a lane takes 4 dimensions of one head, positions in order.
  for (var i = lane; i < heads_here * QUADS; i += LANES) {
    let value_head = i / QUADS;
    let quad = i % QUADS;
    var weighted = vec4<f32>();
    for (var first = 0u; first < length; first += PAGE_TOKENS) {
      let page = page_tables[row.page_table + (start + first) / PAGE_TOKENS];
      let at = (page * KV_HEADS + kv_head) * PAGE_TOKENS * QUADS + quad;
      let scored = value_head * SPLIT + first;
      let count = min(PAGE_TOKENS, length - first);
      for (var p = 0u; p < count; p += ${UNROLL}u) {
        ${times(UNROLL, (u) => `let value${u} = values[at + (p + ${u}u) * QUADS];`)}
        // What lies past the end is another step's: it counts nothing, whatever it is.
        ${
    times(UNROLL, (u) =>
      `weighted += scores[scored + p + ${u}u] * select(vec4<f32>(), vec4<f32>(value${u}), p + ${u}u < count);`)
  }
      }
    }
    partials[partial_index(workgroup, first_head + value_head) + 1u + quad] = weighted;
  }
}

fn partial_index(workgroup: vec3<u32>, head: u32) -> u32 {
  return ((workgroup.z * HEADS + head) * batch.splits + workgroup.x) * (1u + QUADS);
}
`);
}

/** Decode rows, second half: the splits of each head joined, in order. A thread per 4 dimensions. */
export function decodeJoinWgsl(shape: HeadShape): string {
  return transformerWgsl(/* wgsl */ `
const HEADS = ${shape.heads}u;
const HEAD_DIM = ${shape.headDim}u;
const QUADS = ${shape.paddedDim / 4}u;
const SPLIT = ${SPLIT_TOKENS}u;
const LOWEST = -3.0e38f;

struct Batch {
  first_row: u32,
  splits: u32,
}

@group(0) @binding(0) var<uniform> batch: Batch;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> attended: array<f16>; // (rows, HEADS, HEAD_DIM)

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= HEADS * QUADS) {
    return;
  }
  let head = id.x / QUADS;
  let quad = id.x % QUADS;
  let row = batch.first_row + id.y;
  let splits = rows[row].position / SPLIT + 1u;
  let first = (id.y * HEADS + head) * batch.splits * (1u + QUADS);
  // A split past the last one is read as the last, and weighs nothing.
  let last = first + (splits - 1u) * (1u + QUADS);
  var maximum = LOWEST;
  for (var split = 0u; split < splits; split += ${UNROLL}u) {
    ${
    times(
      UNROLL,
      (u) => `let m${u} = partials[min(first + (split + ${u}u) * (1u + QUADS), last)].x;`,
    )
  }
    ${times(UNROLL, (u) => `maximum = max(maximum, m${u});`)}
  }
  var sum = 0.0;
  var weighted = vec4<f32>();
  for (var split = 0u; split < splits; split += ${UNROLL}u) {
    ${
    times(UNROLL, (u) =>
      `let at${u} = min(first + (split + ${u}u) * (1u + QUADS), last);
    let head${u} = partials[at${u}].xy;
    let value${u} = partials[at${u} + 1u + quad];`)
  }
    ${
    times(UNROLL, (u) =>
      `let share${u} = select(0.0, exp(head${u}.x - maximum), split + ${u}u < splits);
    sum += share${u} * head${u}.y;
    weighted += share${u} * value${u};`)
  }
  }
  for (var i = 0u; i < 4u; i++) {
    let dim = quad * 4u + i;
    if (dim < HEAD_DIM) {
      attended[(row * HEADS + head) * HEAD_DIM + dim] = to_f16(weighted[i] / sum);
    }
  }
}
`);
}

/**
 * Prefill rows: a workgroup takes one head and a tile of up to {@linkcode tileRows} rows of one
 * sequence, and walks the pages in order with a running softmax (Milakov and Gimelshein 2018). Sixteen
 * lanes share a row: each scores two positions of a page and keeps every sixteenth group of 4
 * dimensions of the result. A page past a row's position leaves that row's state alone, so its bits
 * are the same in any tile.
 */
export function prefillWgsl(shape: HeadShape): string {
  const rows = tileRows(shape);
  const quads = shape.paddedDim / 4;
  const kept = Math.ceil(quads / ROW_LANES);
  /** Code for each group of 4 dimensions that a lane keeps; the last may be past the head's end. */
  const eachKept = (code: (n: number, quad: string) => string) =>
    times(kept, (n) => {
      const quad = `(lane_in_row + ${n * ROW_LANES}u)`;
      const body = code(n, quad);
      return (n + 1) * ROW_LANES <= quads ? body : `if (${quad} < QUADS) { ${body} }`;
    });
  return transformerWgsl(/* wgsl */ `
${headConstants(shape)}
const TILE_ROWS = ${rows}u;
const ROW_LANES = ${ROW_LANES}u;
const LANES = ${rows * ROW_LANES}u;

@group(0) @binding(0) var<storage, read> tiles: array<Tile>;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> page_tables: array<u32>;
@group(0) @binding(3) var<storage, read> qkv: array<f32>;
@group(0) @binding(4) var<storage, read> keys: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read> values: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> attended: array<f16>; // (rows, HEADS, HEAD_DIM)

var<workgroup> queries: array<vec4<f32>, ${rows * quads}>; // (TILE_ROWS, QUADS)
var<workgroup> scores: array<f32, ${rows * PAGE_TOKENS}>; // (TILE_ROWS, PAGE_TOKENS)
var<workgroup> weights: array<f32, ${rows * PAGE_TOKENS}>; // (TILE_ROWS, PAGE_TOKENS)

@compute @workgroup_size(LANES)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let tile = tiles[workgroup.x];
  let head = workgroup.y;
  let kv_head = head / GROUP;
  let row_in_tile = lane / ROW_LANES;
  let lane_in_row = lane % ROW_LANES;
  // Lanes past the tile's last row follow it along and write nothing.
  let row = tile.first_row + min(row_in_tile, tile.rows - 1u);
  let position = rows[row].position;
  let last_position = rows[tile.first_row + tile.rows - 1u].position;

  for (var i = lane; i < TILE_ROWS * QUADS; i += LANES) {
    let from_row = tile.first_row + min(i / QUADS, tile.rows - 1u);
    queries[i] = query_quad(from_row, head, i % QUADS);
  }
  workgroupBarrier();

  var maximum = LOWEST;
  var sum = 0.0;
  ${times(kept, (n) => `var weighted${n} = vec4<f32>();`)}
  for (var start = 0u; start <= last_position; start += PAGE_TOKENS) {
    let page = page_tables[tile.page_table + start / PAGE_TOKENS];
    let page_head = (page * KV_HEADS + kv_head) * PAGE_TOKENS * QUADS;
    var score_low = 0.0;
    var score_high = 0.0;
    for (var quad = 0u; quad < QUADS; quad++) {
      let query = queries[row_in_tile * QUADS + quad];
      let at = page_head + quad * PAGE_TOKENS + lane_in_row;
      score_low += dot(query, vec4<f32>(keys[at]));
      score_high += dot(query, vec4<f32>(keys[at + ROW_LANES]));
    }
    let at = row_in_tile * PAGE_TOKENS;
    scores[at + lane_in_row] = select(LOWEST, score_low, start + lane_in_row <= position);
    scores[at + lane_in_row + ROW_LANES] =
      select(LOWEST, score_high, start + lane_in_row + ROW_LANES <= position);
    workgroupBarrier();

    let live = start <= position;
    var raised = maximum;
    if (live) {
      for (var i = 0u; i < PAGE_TOKENS; i++) {
        raised = max(raised, scores[at + i]);
      }
      weights[at + lane_in_row] = exp(scores[at + lane_in_row] - raised);
      weights[at + lane_in_row + ROW_LANES] = exp(scores[at + lane_in_row + ROW_LANES] - raised);
    }
    workgroupBarrier();

    if (live) {
      let shrink = exp(maximum - raised);
      maximum = raised;
      sum *= shrink;
      ${times(kept, (n) => `weighted${n} *= shrink;`)}
      let length = min(PAGE_TOKENS, position - start + 1u);
      for (var i = 0u; i < length; i++) {
        let weight = weights[at + i];
        sum += weight;
        let value = page_head + i * QUADS;
        ${eachKept((n, quad) => `weighted${n} += weight * vec4<f32>(values[value + ${quad}]);`)}
      }
    }
  }
  if (row_in_tile >= tile.rows) {
    return;
  }
  let target_head = (row * HEADS + head) * HEAD_DIM;
  ${eachKept((n, quad) => `store_quad(target_head, ${quad}, weighted${n} / sum);`)}
}

fn store_quad(target_head: u32, quad: u32, value: vec4<f32>) {
  for (var i = 0u; i < 4u; i++) {
    if (quad * 4u + i < HEAD_DIM) {
      attended[target_head + quad * 4u + i] = to_f16(value[i]);
    }
  }
}
`);
}
