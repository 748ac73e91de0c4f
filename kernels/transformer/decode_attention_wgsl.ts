/**
 * WGSL of attention for decode rows, first half: every split of the context on its own (Dao et al.,
 * Flash-Decoding). `decode_join_wgsl.ts` is the other.
 *
 * A workgroup's time is its chain of waits for memory and barriers: the row, its pages, then keys and
 * values at once; values wait in registers until the scores are there. What hides the waits is other
 * workgroups, so they are small and share one piece of workgroup memory among all their phases. Indices
 * into it are constants wherever a loop was, for every other one is clamped.
 *
 * @module
 */
import { headConstants, times } from "./attention_wgsl.ts";
import { PAGE_TOKENS, transformerWgsl } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

/** Pages of a split of the context: few, so that one long context fills a large GPU. */
const SPLIT_PAGES = 2;

/** Positions of a split of the context. */
export const SPLIT_TOKENS = SPLIT_PAGES * PAGE_TOKENS;

/** Vectors of the scores of a split. */
const SCORE_QUADS = SPLIT_TOKENS / 4;

/**
 * How a split's workgroup shares its work. All counts but those of quads (4 dimensions) are powers of
 * two.
 */
interface Tiling {
  lanes: number;
  /** Query heads; the last ones may have nothing to do. */
  heads: number;
  /** Scores: a lane takes its slot in both pages, every head, and a part of the dimensions. */
  scores: { parts: number; partQuads: number };
  /** Softmax: so many lanes for a head. */
  headLanes: number;
  /**
   * Values: a lane takes 4 dimensions, the heads of a set, and a run of positions. Its weights come in
   * `vectors` of as many heads as there are, up to four.
   */
  values: { sets: number; setHeads: number; vectors: number; runs: number; runTokens: number };
  /** Exchanged vectors: (high, parts, SCORE_QUADS). */
  high: number;
}

function tiling({ group, paddedDim }: HeadShape): Tiling {
  const quads = paddedDim / 4;
  // Large heads take more lanes, so that keys and values still fit a lane's registers.
  const lanes = quads <= 32 ? 128 : 256;
  const parts = lanes / PAGE_TOKENS;
  // At most 8 KiB are exchanged, with which four or five workgroups share 48 KiB.
  const heads = Math.min(powerOfTwoFrom(group), 1024 / lanes);
  const runs = 4 * quads <= lanes ? 4 : 2;
  const sets = Math.min(heads, powerOfTwoTo(lanes / (runs * quads)));
  const setHeads = heads / sets;
  const vectors = Math.ceil(setHeads / 4);
  const runTokens = SPLIT_TOKENS / runs;
  return {
    lanes,
    heads,
    scores: { parts, partQuads: Math.ceil(quads / parts) },
    headLanes: Math.min(PAGE_TOKENS, lanes / heads),
    values: { sets, setHeads, vectors, runs, runTokens },
    high: Math.max(heads, sets * vectors * Math.ceil(runTokens / SCORE_QUADS)),
  };
}

const powerOfTwoTo = (n: number) => 2 ** Math.floor(Math.log2(n));
const powerOfTwoFrom = (n: number) => 2 ** Math.ceil(Math.log2(n));

/** Query heads of one KV head that share a workgroup. */
export function headTile(shape: HeadShape): number {
  return tiling(shape).heads;
}

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
const HEAD_LANES = ${tile.headLanes}u; // lanes of a head in the softmax

@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> page_tables: array<u32>;
@group(0) @binding(2) var<storage, read> qkv: array<Query>;
@group(0) @binding(3) var<storage, read> keys: array<vec4<f16>>;
@group(0) @binding(4) var<storage, read> values: array<vec4<f16>>;
// (splits, rows of the batch, heads, 1 + QUADS): maximum and sum, then the weighted values.
@group(0) @binding(5) var<storage, read_write> partials: array<vec4<f32>>;
${batchWgsl(place, 6)}
// One after another:
// queries (heads, parts, quads of a part),
// scores (heads, parts, positions),
// weights (vectors of heads, runs, positions of a run), each over up to four heads,
// weighted values (heads of a set, upper half of the runs times lanes of a run).
var<workgroup> exchange: array<array<array<vec4<f32>, ${SCORE_QUADS}>, ${tile.scores.parts}>, ${tile.high}>;
var<workgroup> maxima: array<array<vec4<f32>, ${tile.headLanes / 4}>, TILE>;
var<workgroup> sums: array<array<vec4<f32>, ${tile.headLanes / 4}>, TILE>;

fn along(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
  return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
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
  if (run == 0u) {
    let first = value_set * ${tile.values.setHeads}u;
    ${
    times(tile.values.setHeads, (h) =>
      `if (first + ${h}u < heads_here) {
      partials[base + (first + ${h}u) * (1u + QUADS) + 1u + quad] = weighted${h};
    }`)
  }
  }
  if (head_lane == 0u && head < heads_here) {
    let total = ${pairwise(tile.headLanes / 4, (i) => `sums[head][${i}]`)};
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
  const { lanes, heads, scores: { partQuads } } = tile;
  const { columns, fills } = queryFills(tile);
  return times(fills, (i) => {
    const store =
      `exchange[query_head${i}][column${i} / ${partQuads}u][column${i} % ${partQuads}u] = query${i};`;
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
        times(partQuads, (i) => `let key${p}_${i} = keys[key_at${p} + ${at(i)} * PAGE_TOKENS];`)
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
  let weight_run = min(run, ${runs - 1}u);
  let run_start = weight_run * ${runTokens}u;
  let value_page = min(run_start / PAGE_TOKENS, last_page);
  let first_slot = run_start % PAGE_TOKENS;
  let last_slot = min(length - 1u - value_page * PAGE_TOKENS, PAGE_TOKENS - 1u);
  let value_at = (select(page0, page1, value_page > 0u) * KV_HEADS + kv_head) * PAGE_TOKENS * QUADS + quad;
  ${
    times(
      runTokens,
      (i) => `let value${i} = values[value_at + min(first_slot + ${i}u, last_slot) * QUADS];`,
    )
  }`;
}

/** Scores stay in registers until the queries, whose place they take, have been used. */
function scoreKeys({ heads, scores: { partQuads } }: Tiling): string {
  return `
  // Scores of a part of the dimensions.
  ${times(SPLIT_PAGES * heads, (n) => `var score${n} = 0.0;`, " ")}
  ${
    times(partQuads, (i) =>
      `{
    ${times(SPLIT_PAGES, (p) => `let k${p} = vec4<f32>(key${p}_${i});`)}
    ${
        times(heads, (h) =>
          `let q${h} = exchange[${h}][part][${i}];
    ${
            times(SPLIT_PAGES, (p) => {
              const score = `score${p * heads + h}`;
              return `${score} = along(${score}, q${h}, k${p});`;
            })
          }`)
      }
  }`)
  }
  workgroupBarrier();
  ${
    times(heads, (h) =>
      times(SPLIT_PAGES, (p) =>
        `exchange[${h}][part][${p * PAGE_TOKENS / 4}u + slot / 4u][slot % 4u] = score${
          p * heads + h
        };`))
  }
  workgroupBarrier();`;
}

/** The softmax of each head. A lane has every so many of its positions. */
function shareSoftmax(tile: Tiling): string {
  const { lanes, heads, headLanes, scores: { parts }, values } = tile;
  const { sets, setHeads, vectors, runTokens } = values;
  const mine = SPLIT_TOKENS / headLanes;
  const all = heads * headLanes === lanes;
  const ofHeads = (code: string) => all ? `{ ${code} }` : `if (head < TILE) { ${code} }`;
  const score = (i: number) => (part: number) =>
    `exchange[head][${part}][position${i} / 4u][position${i} % 4u]`;
  const width = Math.min(4, setHeads);
  const [far, near] = runTokens > SCORE_QUADS
    ? [` + at / ${SCORE_QUADS}u * ${sets * vectors}u`, ` % ${SCORE_QUADS}u`]
    : ["", ""];
  return `
  let head = lane / HEAD_LANES;
  let head_lane = lane % HEAD_LANES;
  ${
    times(mine, (i) =>
      `let position${i} = head_lane + ${i}u * HEAD_LANES;
  var scored${i} = LOWEST;`)
  }
  ${
    ofHeads(`
    ${
      times(
        mine,
        (i) => `scored${i} = select(LOWEST, ${pairwise(parts, score(i))}, position${i} < length);`,
      )
    }
    var largest = scored0;
    ${times(mine - 1, (i) => `largest = max(largest, scored${i + 1});`)}
    maxima[head][head_lane / 4u][head_lane % 4u] = largest;
  `)
  }
  workgroupBarrier();
  var maximum = LOWEST;
  ${
    ofHeads(`
    var largest = maxima[head][0];
    ${times(headLanes / 4 - 1, (i) => `largest = max(largest, maxima[head][${i + 1}]);`)}
    maximum = max(max(largest.x, largest.y), max(largest.z, largest.w));
    let vector = head / ${setHeads}u * ${vectors}u + head % ${setHeads}u / ${width}u;
    var sum = 0.0;
    ${
      times(mine, (i) =>
        `{
      let weight = select(0.0, exp(scored${i} - maximum), position${i} < length);
      let at = position${i} % ${runTokens}u;
      exchange[vector${far}][position${i} / ${runTokens}u][at${near}][head % ${width}u] = weight;
      sum += weight;
    }`)
    }
    sums[head][head_lane / 4u][head_lane % 4u] = sum;
  `)
  }
  workgroupBarrier();`;
}

/** The weighted values of each run, then the runs put together: the upper half's to the lower. */
function weighValues({ values }: Tiling): string {
  const { sets, setHeads, vectors, runs, runTokens } = values;
  const width = Math.min(4, setHeads);
  const set = sets > 1 ? `value_set * ${vectors}u + ` : "";
  const weights = (i: number, v: number) =>
    `exchange[${set}${v + Math.floor(i / SCORE_QUADS) * sets * vectors}u][weight_run][${
      i % SCORE_QUADS
    }]`;
  return `
  ${times(setHeads, (h) => `var weighted${h} = vec4<f32>();`, " ")}
  ${
    times(runTokens, (i) =>
      `{
    let value = vec4<f32>(value${i});
    ${times(vectors, (v) => `let weights${v} = ${weights(i, v)};`)}
    ${
        times(setHeads, (h) =>
          `weighted${h} += weights${Math.floor(h / width)}.${"xyzw"[h % width]} * value;`)
      }
  }`)
  }
  workgroupBarrier();
  ${
    [2, 1].filter((half) => 2 * half <= runs).map((half) => {
      const at = (run: string) => `(${run}) % ${runs / 2}u * ${sets}u * QUADS + value_lane`;
      const place = (h: number) => `exchange[${h}][at / ${SCORE_QUADS}u][at % ${SCORE_QUADS}u]`;
      return `if (run >= ${half}u && run < ${2 * half}u) {
    let at = ${at("run")};
    ${times(setHeads, (h) => `${place(h)} = weighted${h};`)}
  }
  workgroupBarrier();
  if (run < ${half}u) {
    let at = ${at(`run + ${half}u`)};
    ${times(setHeads, (h) => `weighted${h} += ${place(h)};`)}
  }`;
    }).join("\n  ")
  }`;
}
