/**
 * WGSL of attention for decode rows, first half: every split of the context on its own (Dao et al.,
 * Flash-Decoding). `decode_join_wgsl.ts` is the other.
 *
 * A workgroup's time is its chain of waits for memory and barriers: the row, its pages, then keys and
 * values at once; values wait in registers until the scores are there. What hides the waits is other
 * workgroups, so they are small and share one piece of workgroup memory among all their phases.
 *
 * A layer's kernel begins with its code in no cache near, so with one row, whose workgroups run it
 * once, code is memory waited for like any other. What has been loaded is therefore worked on by loops,
 * a few registers a turn, between which the registers still to come move up. How often a loop runs is
 * said by data: where it is a constant, compilers unroll it again.
 *
 * @module
 */
import { headConstants, times } from "./attention_wgsl.ts";
import {
  SCORE_QUADS,
  SCORE_ROWS,
  SPLIT_PAGES,
  SPLIT_TOKENS,
  type Tiling,
  tiling,
} from "./decode_tiling.ts";
import { PAGE_TOKENS, transformerWgsl } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

/**
 * Decode rows run in batches of as many as have room for their partial results, at the step's longest
 * context. The first batch, most often the only one, waits for no uniform.
 */
export type BatchPlace = "first" | "later";

/** `batch_first_row()`; a later batch has two more buffers, the first of them at `binding`. */
export const batchWgsl = (place: BatchPlace, binding: number) =>
  place === "first"
    ? `
fn batch_first_row() -> u32 {
  return 0u;
}
`
    : `
struct Batch {
  index: u32,
  row_splits: u32, // rows times splits that there is room for
}

@group(0) @binding(${binding}) var<uniform> step: Step;
@group(0) @binding(${binding + 1}) var<uniform> batch: Batch;

fn batch_first_row() -> u32 {
  let splits = (step.context_tokens + SPLIT - 1u) / SPLIT;
  return batch.index * (batch.row_splits / splits);
}
`;

/** `term(0) + ... + term(n - 1)` in pairs, n a power of two. */
const pairwise = (n: number, term: (i: number) => string): string =>
  n === 1 ? term(0) : `(${pairwise(n / 2, term)} + ${pairwise(n / 2, (i) => term(n / 2 + i))})`;

/**
 * The kernel's code; dispatched over (splits, KV heads times tiles of {@linkcode headTile} query heads,
 * rows). A workgroup takes one row, one tile of heads and one split of the context
 * ({@linkcode SPLIT_TOKENS} positions), and leaves the softmax's maximum, its sum and the weighted
 * values.
 */
export function decodeSplitWgsl(shape: HeadShape, place: BatchPlace): string {
  const quads = shape.paddedDim / 4;
  const tile = tiling(shape);
  const { lanes, heads } = tile;
  return transformerWgsl(/* wgsl */ `
${headConstants(shape)}
const TILE = ${heads}u;
const TILES = ${Math.ceil(shape.group / heads)}u;
const LANES = ${lanes}u;
const SPLIT = ${SPLIT_TOKENS}u;
const SCORE_QUADS = ${SCORE_QUADS}u;

@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> page_tables: array<u32>;
@group(0) @binding(2) var<storage, read> qkv: array<Query>;
// Four float16 each: as words, of which two move up instead of four halves.
@group(0) @binding(3) var<storage, read> keys: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read> values: array<vec2<u32>>;
// (splits, rows of the batch, heads, 1 + QUADS): maximum and sum, then the weighted values.
@group(0) @binding(5) var<storage, read_write> partials: array<vec4<f32>>;
${batchWgsl(place, 6)}
// One after another:
// queries (heads, parts, turns, quads of a turn),
// scores (heads, parts, positions),
// weights (vectors of heads, positions of a quad, quads of positions), each over up to four heads,
// weighted values (heads put together, lanes).
var<workgroup> exchange: array<array<array<array<vec4<f32>, 4>, ${SCORE_ROWS}>, ${tile.scores.parts}>, ${tile.high}>;
var<workgroup> maxima: array<array<vec4<f32>, ${SCORE_ROWS}>, TILE>;
var<workgroup> sums: array<array<vec4<f32>, ${SCORE_ROWS}>, TILE>;

fn along(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
  return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

fn widen(halves: vec2<u32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(halves.x), unpack2x16float(halves.y));
}

@compute @workgroup_size(LANES)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) workgroups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let row_index = batch_first_row() + workgroup.z;
  let kv_head = workgroup.y / TILES;
  let first_in_group = (workgroup.y % TILES) * TILE;
  let first_head = kv_head * GROUP + first_in_group;
  let heads_here = min(TILE, GROUP - first_in_group);
  ${askQueries(tile)}
  let row = rows[row_index];
  let start = workgroup.x * SPLIT;
  if (start > row.position) {
    return;
  }
  let length = min(SPLIT, row.position - start + 1u);
  let last_page = (length - 1u) / PAGE_TOKENS;
  let table = row.page_table + start / PAGE_TOKENS;
  let page0 = page_tables[table];
  let page1 = page_tables[table + last_page]; // the first one again where there is no second
  ${askKeys(tile, quads)}
  ${askValues(tile, quads)}
  ${shareQueries(tile)}
  workgroupBarrier();
  ${scoreKeys(tile)}
  ${shareSoftmax(tile)}
  ${weighValues(tile)}

  let base = ((workgroup.x * workgroups.z + workgroup.z) * HEADS + first_head) * (1u + QUADS);
  ${joinRuns(tile, quads)}
  if (head_lane == 0u && head < heads_here) {
    let total = ${pairwise(SCORE_ROWS, (i) => `sums[head][${i}]`)};
    partials[base + head * (1u + QUADS)] =
      vec4<f32>(maximum, (total.x + total.y) + (total.z + total.w), 0.0, 0.0);
  }
}
`);
}

/** How many vectors of queries a lane loads, and a head's columns of them, padded to whole parts. */
function queryFills({ lanes, heads, scores }: Tiling) {
  const columns = scores.parts * scores.partQuads;
  return { columns, fills: Math.ceil(heads * columns / lanes) };
}

/** Queries do not depend on what the row says, so they are asked for before it. */
function askQueries(tile: Tiling): string {
  const { columns, fills } = queryFills(tile);
  return times(fills, (i) =>
    `let entry${i} = lane + ${i * tile.lanes}u;
  let query_head${i} = entry${i} / ${columns}u;
  let column${i} = entry${i} % ${columns}u;
  let query${i} = query_quad(row_index, min(first_head + query_head${i}, HEADS - 1u), column${i});`);
}

function shareQueries(tile: Tiling): string {
  const { lanes, heads, scores: { partQuads, turnQuads } } = tile;
  const { columns, fills } = queryFills(tile);
  return times(fills, (i) => {
    const inPart = `column${i} % ${partQuads}u`;
    const store = `exchange[query_head${i}][column${i} / ${partQuads}u]` +
      `[${inPart} / ${turnQuads}u][${inPart} % ${turnQuads}u] = query${i};`;
    return (i + 1) * lanes <= heads * columns ? store : `if (query_head${i} < TILE) { ${store} }`;
  });
}

function askKeys({ scores: { parts, partQuads } }: Tiling, quads: number): string {
  const at = (i: number) =>
    parts * partQuads > quads ? `min(first_quad + ${i}u, QUADS - 1u)` : `(first_quad + ${i}u)`;
  return `
  let part = lane / PAGE_TOKENS;
  let slot = lane % PAGE_TOKENS;
  let first_quad = part * ${partQuads}u;
  ${
    times(SPLIT_PAGES, (p) =>
      `let key_at${p} = (page${p} * KV_HEADS + kv_head) * QUADS * PAGE_TOKENS + slot;
  ${
        times(partQuads, (i) => `var key${p}_${i} = keys[key_at${p} + ${at(i)} * PAGE_TOKENS];`)
      }`)
  }`;
}

function askValues({ values: { sets, runs, runTokens } }: Tiling, quads: number): string {
  return `
  // A run's positions past the end are read as the last one, and weigh nothing.
  let value_lane = lane % ${sets * quads}u;
  let run = lane / ${sets * quads}u;
  let value_set = value_lane / QUADS;
  let quad = value_lane % QUADS;
  let run_start = min(run, ${runs - 1}u) * ${runTokens}u;
  let value_page = min(run_start / PAGE_TOKENS, last_page);
  let first_slot = run_start % PAGE_TOKENS;
  let last_slot = length - 1u - value_page * PAGE_TOKENS; // of that page or a later one
  let value_at = (select(page0, page1, value_page > 0u) * KV_HEADS + kv_head) * PAGE_TOKENS * QUADS + quad;
  ${
    times(
      runTokens,
      (i) => `var value${i} = values[value_at + min(first_slot + ${i}u, last_slot) * QUADS];`,
    )
  }`;
}

/** `n` registers, of which the first `used` have been used up: those behind take their places. */
const moveUp = (n: number, used: number, name: (i: number) => string) =>
  times(n - used, (i) => `${name(i)} = ${name(i + used)};`, " ");

/** Scores stay in registers until the queries, whose place they take, have been used. */
function scoreKeys({ heads, scores: { partQuads, turnQuads } }: Tiling): string {
  return `
  // Scores of a part of the dimensions.
  ${times(SPLIT_PAGES * heads, (n) => `var score${n} = 0.0;`, " ")}
  let key_turns = select(0u, ${partQuads / turnQuads}u, length > 0u); // never 0
  for (var turn = 0u; turn < key_turns; turn++) {
    ${
    times(turnQuads, (i) =>
      `{
      ${times(SPLIT_PAGES, (p) => `let k${p} = widen(key${p}_${i});`)}
      ${
        times(heads, (h) =>
          `let q${h} = exchange[${h}][part][turn][${i}];
      ${
            times(SPLIT_PAGES, (p) => {
              const score = `score${p * heads + h}`;
              return `${score} = along(${score}, q${h}, k${p});`;
            })
          }`)
      }
    }`)
  }
    ${times(SPLIT_PAGES, (p) => moveUp(partQuads, turnQuads, (i) => `key${p}_${i}`))}
  }
  workgroupBarrier();
  let slot_row = slot / 16u;
  let slot_quad = slot / 4u % 4u;
  ${
    times(heads, (h) =>
      times(SPLIT_PAGES, (p) =>
        `exchange[${h}][part][slot_row + ${p * PAGE_TOKENS / 16}u][slot_quad][slot % 4u] = score${
          p * heads + h
        };`))
  }
  workgroupBarrier();`;
}

/** The softmax of each head: a lane has 4 positions. */
function shareSoftmax({ lanes, heads, scores: { parts }, values }: Tiling): string {
  const { setHeads, vectors } = values;
  const ofHeads = (code: string) =>
    heads * SCORE_QUADS === lanes ? `{ ${code} }` : `if (head < TILE) { ${code} }`;
  const width = Math.min(4, setHeads);
  return `
  let head = lane / SCORE_QUADS;
  let head_lane = lane % SCORE_QUADS;
  let score_row = head_lane / 4u;
  let score_quad = head_lane % 4u;
  var scored = vec4<f32>(LOWEST);
  ${
    ofHeads(`
    let there = vec4<u32>(4u * head_lane) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(length);
    scored = select(
      scored,
      ${pairwise(parts, (part) => `exchange[head][${part}][score_row][score_quad]`)},
      there,
    );
    maxima[head][score_row][score_quad] =
      max(max(scored.x, scored.y), max(scored.z, scored.w));
  `)
  }
  workgroupBarrier();
  var maximum = LOWEST;
  ${
    ofHeads(`
    var largest = maxima[head][0];
    ${times(SCORE_ROWS - 1, (i) => `largest = max(largest, maxima[head][${i + 1}]);`)}
    maximum = max(max(largest.x, largest.y), max(largest.z, largest.w));
    // The first position is always there, so what is not weighs exp of about LOWEST, which is 0.
    let weight = exp(scored - maximum);
    let vector = head / ${setHeads}u * ${vectors}u + head % ${setHeads}u / ${width}u;
    ${
      times(4, (i) =>
        `exchange[vector][${i}][score_row][score_quad][head % ${width}u] = weight[${i}];`)
    }
    sums[head][score_row][score_quad] = (weight.x + weight.y) + (weight.z + weight.w);
  `)
  }
  workgroupBarrier();`;
}

/** The weighted values of each run, as far as positions are there. */
function weighValues({ values }: Tiling): string {
  const { sets, setHeads, vectors, runTokens } = values;
  const width = Math.min(4, setHeads);
  const set = sets > 1 ? `value_set * ${vectors}u + ` : "";
  return `
  ${times(setHeads, (h) => `var weighted${h} = vec4<f32>();`, " ")}
  let first_position_quad = run_start / 4u;
  let position_quads = min(first_position_quad + ${runTokens / 4}u, (length + 3u) / 4u);
  for (var at = first_position_quad; at < position_quads; at++) {
    let weight_row = at / 4u;
    let weight_quad = at % 4u;
    ${
    times(4, (i) =>
      `{
      let value = widen(value${i});
      ${
        times(
          vectors,
          (v) => `let weights${v} = exchange[${set}${v}u][${i}][weight_row][weight_quad];`,
        )
      }
      ${
        times(setHeads, (h) =>
          `weighted${h} += weights${Math.floor(h / width)}.${"xyzw"[h % width]} * value;`)
      }
    }`)
  }
    ${moveUp(runTokens, 4, (i) => `value${i}`)}
  }`;
}

/** The runs' weighted values summed, some heads at a time, each by another run's lanes, and written. */
function joinRuns({ lanes, scores: { parts }, values }: Tiling, quads: number): string {
  const { sets, setHeads, runs, together } = values;
  const slices = lanes / (parts * SCORE_QUADS); // of a head's vectors, a slice for each `high`
  const width = sets * quads / SCORE_QUADS;
  const rows = Number.isInteger(width) && parts % width === 0;
  /** A head's vector of a run's lane: its indices are shared by runs where these are whole rows. */
  const place = (head: string, run: number) => {
    const [slice, part, at] = rows
      ? [
        `${Math.floor(run * width / parts)}u`,
        `value_lane / SCORE_QUADS + ${run * width % parts}u`,
        "value_lane",
      ]
      : [
        `(value_lane + ${run * sets * quads}u) / ${parts * SCORE_QUADS}u`,
        `(value_lane + ${run * sets * quads}u) / SCORE_QUADS % ${parts}u`,
        `(value_lane + ${run * sets * quads}u)`,
      ];
    return `exchange[${head} * ${slices}u + ${slice}][${part}][${at} / 4u % ${SCORE_ROWS}u][${at} % 4u]`;
  };
  return times(setHeads / together, (round) =>
    `workgroupBarrier();
  ${
      times(together, (h) =>
        `exchange[${h * slices}u + lane / ${parts * SCORE_QUADS}u]` +
        `[lane / SCORE_QUADS % ${parts}u][lane / 4u % ${SCORE_ROWS}u][lane % 4u] = weighted${
          round * together + h
        };`)
    }
  workgroupBarrier();
  ${
      times(Math.ceil(together / runs), (turn) =>
        `{
    let joined_head = run + ${turn * runs}u;
    let target_head = value_set * ${setHeads}u + ${round * together}u + joined_head;
    if (joined_head < ${together}u && run < ${runs}u && target_head < heads_here) {
      partials[base + target_head * (1u + QUADS) + 1u + quad] =
        ${pairwise(runs, (r) => place("joined_head", r))};
    }
  }`)
    }`);
}
