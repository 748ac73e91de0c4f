/**
 * WGSL of paged grouped-query attention: what both kinds of rows share, and the kernel of prefill rows.
 * It is generated per head shape so that the small loops over heads and dimensions are unrolled and
 * accumulators stay in registers.
 *
 * A row at position p attends to positions 0..p of its sequence, through its page table. All that
 * orders a row's arithmetic is the head shape and constants of this file; which rows it shares a
 * workgroup or a step with changes none of its bits.
 *
 * @module
 */
import type { HeadShape } from "./kv_layout.ts";
import { PAGE_TOKENS, transformerWgsl } from "./inputs.ts";

/** Lanes that share a row in a prefill workgroup. */
const ROW_LANES = 16;

/** Below WebGPU's guaranteed 16 KiB of workgroup memory. */
const WORKGROUP_BYTES = 15 * 1024;

/** Rows of one sequence that share a prefill workgroup. */
export function tileRows({ paddedDim }: HeadShape): number {
  const bytesPerRow = 4 * (paddedDim + 2 * PAGE_TOKENS);
  return [16, 8, 4].find((rows) => rows * bytesPerRow <= WORKGROUP_BYTES) ?? 2;
}

/** `n` lines of generated code. */
export const times = (n: number, line: (i: number) => string, separator = "\n") =>
  Array.from({ length: n }, (_, i) => line(i)).join(separator);

/**
 * Constants of a head shape, and `query_quad`, which reads `qkv`, an `array<Query>`: by vectors where
 * heads begin at whole ones.
 */
export const headConstants = (shape: HeadShape) => `
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
  ${
  shape.headDim % 4 === 0
    ? `return select(vec4<f32>(), qkv[at / 4u] * SCALE, quad < QUADS);
}

alias Query = vec4<f32>;`
    : `var value = vec4<f32>();
  for (var i = 0u; i < 4u; i++) {
    if (quad * 4u + i < HEAD_DIM) {
      value[i] = qkv[at + i];
    }
  }
  return value * SCALE;
}

alias Query = f32;`
}
`;

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
@group(0) @binding(3) var<storage, read> qkv: array<Query>;
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
