/**
 * WGSL of attention for decode rows, first half: every split of the context on its own (Dao et al.,
 * Flash-Decoding). `decode_join_wgsl.ts` is the other.
 *
 * One row of a long context is a hundred workgroups of little work, so its time is their chain of
 * waits for memory and barriers: the row, its pages, then keys and values at once; values wait in
 * registers until the scores are there. Indices into workgroup memory are constants wherever a loop
 * was, for every other one is clamped.
 *
 * @module
 */
import { FleetError } from "../../shared/errors.ts";
import { headConstants, times } from "./attention_wgsl.ts";
import { PAGE_TOKENS, transformerWgsl } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

/** Pages of a split of the context: few, so that one long context fills a large GPU. */
const SPLIT_PAGES = 2;

/** Positions of a split of the context. */
export const SPLIT_TOKENS = SPLIT_PAGES * PAGE_TOKENS;

/** Lanes of a split's workgroup: teams of a lane for each slot of a page. */
const LANES = 256;
const TEAMS = LANES / PAGE_TOKENS;

/** Most query heads of one KV head that a workgroup serves: a team each for the softmax. */
const MAX_HEAD_TILE = TEAMS;

/** WebGPU guarantees 16 KiB. */
const WORKGROUP_BYTES = 15 * 1024;

/** How a split's workgroup shares its work. All counts but those of quads are powers of two. */
interface Tiling {
  /** Query heads; the last ones may have nothing to do. */
  heads: number;
  /** Scores: a lane takes its slot in both pages, the heads of a set, and a part of the dimensions. */
  scores: { sets: number; setHeads: number; parts: number; partQuads: number; vectors: number };
  /** Values: a lane takes 4 dimensions, the heads of a set, and a run of positions. */
  values: { sets: number; setHeads: number; runs: number; runTokens: number };
  /** vec4 by which lanes exchange scores, then weighted values. */
  exchanged: number;
  bytes: number;
}

function tilingOf(heads: number, quads: number): Tiling {
  const sets = Math.min(heads, 2);
  const setHeads = heads / sets;
  const parts = TEAMS / sets;
  // A head's columns of queries later hold the maxima of its 32 slots.
  const partQuads = Math.max(Math.ceil(quads / parts), PAGE_TOKENS / 4 / parts);
  const vectors = Math.ceil(SPLIT_PAGES * setHeads / 4);

  const runs = quads <= 32 ? 4 : 2;
  const fit = 2 ** Math.floor(Math.log2(LANES / (runs * quads)));
  const valueSets = Math.min(heads, fit);
  const exchanged = Math.max(TEAMS * vectors * PAGE_TOKENS, runs / 2 * heads * quads);
  const queries = heads * parts * partQuads;
  return {
    heads,
    scores: { sets, setHeads, parts, partQuads, vectors },
    values: {
      sets: valueSets,
      setHeads: heads / valueSets,
      runs,
      runTokens: SPLIT_TOKENS / runs,
    },
    exchanged,
    bytes: 16 * (queries + exchanged) + 4 * heads * (SPLIT_TOKENS + PAGE_TOKENS),
  };
}

function tiling({ group, paddedDim }: HeadShape): Tiling {
  for (let heads = MAX_HEAD_TILE; heads >= 1; heads /= 2) {
    if (heads >= 2 * group) continue;
    const tiling = tilingOf(heads, paddedDim / 4);
    if (tiling.bytes <= WORKGROUP_BYTES) return tiling;
  }
  throw new FleetError("bad-checkpoint", `Attention heads of ${paddedDim} are too large to run`);
}

/** Query heads of one KV head that share a workgroup. */
export function headTile(shape: HeadShape): number {
  return tiling(shape).heads;
}

/**
 * Decode rows run in batches of as many as have room for their partial results, at the step's longest
 * context.
 */
export const BATCH_WGSL = /* wgsl */ `
const SPLIT = ${SPLIT_TOKENS}u;

struct Batch {
  index: u32,
  row_splits: u32, // rows times splits that there is room for
}

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<uniform> batch: Batch;

// Splits of the longest context: the stride of partials.
fn batch_splits() -> u32 {
  return (step.context_tokens + SPLIT - 1u) / SPLIT;
}

fn batch_first_row() -> u32 {
  // The first batch, often the only one, spares the division.
  if (batch.index == 0u) {
    return 0u;
  }
  return batch.index * (batch.row_splits / batch_splits());
}
`;

/** A vector of `n` float32, and its components. */
const vector = (n: number) => n === 1 ? "f32" : `vec${n}<f32>`;
const component = (n: number, i: number) => n === 1 ? "" : `.${"xyzw"[i]}`;
const dynamicComponent = (n: number, index: string) => n === 1 ? "" : `[${index}]`;

/** `term(0) + ... + term(n - 1)` in pairs, n a power of two. */
const pairwise = (n: number, term: (i: number) => string): string =>
  n === 1 ? term(0) : `(${pairwise(n / 2, term)} + ${pairwise(n / 2, (i) => term(n / 2 + i))})`;

/**
 * A workgroup takes one row, up to {@linkcode headTile} query heads of one KV head, and one
 * split of the context ({@linkcode SPLIT_TOKENS} positions), and leaves the softmax's maximum, its sum
 * and the weighted values.
 */
export function decodeSplitWgsl(shape: HeadShape): string {
  const quads = shape.paddedDim / 4;
  const { heads, scores, values, exchanged } = tiling(shape);
  const queryColumns = scores.parts * scores.partQuads;
  const fills = Math.ceil(heads * queryColumns / LANES);
  const valueLanes = values.sets * quads;
  /** A head's vectors of maxima lie where its queries lay. */
  const maxima = (i: number) => `[${Math.floor(i / scores.partQuads)}][${i % scores.partQuads}]`;
  const keyAt = (i: number) =>
    queryColumns > quads ? `min(first_quad + ${i}u, QUADS - 1u)` : `(first_quad + ${i}u)`;
  return transformerWgsl(
    /* wgsl */ `
${headConstants(shape)}
const TILE = ${heads}u;
const TILES = ${Math.ceil(shape.group / heads)}u;
const LANES = ${LANES}u;

${BATCH_WGSL}
@group(0) @binding(2) var<storage, read> rows: array<Row>;
@group(0) @binding(3) var<storage, read> page_tables: array<u32>;
@group(0) @binding(4) var<storage, read> qkv: array<Query>;
@group(0) @binding(5) var<storage, read> keys: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read> values: array<vec4<f16>>;
// (rows of the batch, heads, splits, 1 + QUADS): maximum and sum, then the weighted values.
@group(0) @binding(7) var<storage, read_write> partials: array<vec4<f32>>;

// (sets, heads of a set, parts, quads of a part); once scores are summed, maxima.
var<workgroup> queries: array<array<array<array<vec4<f32>, ${scores.partQuads}>, ${scores.parts}>, ${scores.setHeads}>, ${scores.sets}>;
// Scores (parts, sets, vectors, slots), each vector over pages and heads of a set; then weighted values.
var<workgroup> exchange: array<vec4<f32>, ${exchanged}>;
// (runs, sets, positions of a run), each a vector over the heads of a set.
var<workgroup> weights: array<array<array<${
      vector(values.setHeads)
    }, ${values.runTokens}>, ${values.sets}>, ${values.runs}>;
var<workgroup> sums: array<array<vec4<f32>, ${PAGE_TOKENS / 4}>, TILE>;

fn along(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
  return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

@compute @workgroup_size(LANES)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let row_index = batch_first_row() + workgroup.z;
  let kv_head = workgroup.y / TILES;
  let first_in_group = (workgroup.y % TILES) * TILE;
  let first_head = kv_head * GROUP + first_in_group;
  let heads_here = min(TILE, GROUP - first_in_group);
  ${
      times(fills, (i) =>
        `let entry${i} = lane + ${i * LANES}u;
  let query_head${i} = entry${i} / ${queryColumns}u;
  let query${i} = query_quad(row_index, min(first_head + query_head${i}, HEADS - 1u), entry${i} % ${queryColumns}u);`)
    }
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

  let team = lane / PAGE_TOKENS;
  let slot = lane % PAGE_TOKENS;
  let part = team / ${scores.sets}u;
  let score_set = team % ${scores.sets}u;
  let first_quad = part * ${scores.partQuads}u;
  ${
      times(SPLIT_PAGES, (p) =>
        `let key_at${p} = (page${p} * KV_HEADS + kv_head) * QUADS * PAGE_TOKENS + slot;
  ${
          times(
            scores.partQuads,
            (i) =>
              `let key${p}_${i} = keys[key_at${p} + ${keyAt(i)} * PAGE_TOKENS];`,
          )
        }`)
    }

  // A run's positions past the end are read as the last one, and weigh nothing.
  let value_lane = lane % ${valueLanes}u;
  let run = lane / ${valueLanes}u;
  let value_set = value_lane / QUADS;
  let quad = value_lane % QUADS;
  let run_start = min(run, ${values.runs - 1}u) * ${values.runTokens}u;
  let value_page = min(run_start / PAGE_TOKENS, last_page);
  let first_slot = run_start % PAGE_TOKENS;
  let last_slot = min(length - 1u - value_page * PAGE_TOKENS, PAGE_TOKENS - 1u);
  let value_at = (select(page0, page1, value_page > 0u) * KV_HEADS + kv_head) * PAGE_TOKENS * QUADS + quad;
  ${
      times(
        values.runTokens,
        (i) => `let value${i} = values[value_at + min(first_slot + ${i}u, last_slot) * QUADS];`,
      )
    }

  ${
      times(fills, (i) => {
        const store =
          `queries[query_head${i} / ${scores.setHeads}u][query_head${i} % ${scores.setHeads}u]` +
          `[entry${i} % ${queryColumns}u / ${scores.partQuads}u][entry${i} % ${scores.partQuads}u] = query${i};`;
        return (i + 1) * LANES <= heads * queryColumns
          ? store
          : `if (entry${i} < ${heads * queryColumns}u) { ${store} }`;
      })
    }
  workgroupBarrier();

  // Scores of a part of the dimensions.
  ${times(SPLIT_PAGES * scores.setHeads, (n) => `var score${n} = 0.0;`, " ")}
  ${
      times(scores.partQuads, (i) =>
        `{
    ${times(SPLIT_PAGES, (p) => `let k${p} = vec4<f32>(key${p}_${i});`)}
    ${
          times(scores.setHeads, (h) =>
            `let q${h} = queries[score_set][${h}][part][${i}];
    ${
              times(SPLIT_PAGES, (p) => {
                const score = `score${p * scores.setHeads + h}`;
                return `${score} = along(${score}, q${h}, k${p});`;
              })
            }`)
        }
  }`)
    }
  let team_scores = team * ${scores.vectors * PAGE_TOKENS}u + slot;
  ${
      times(scores.vectors, (v) => {
        const of = times(4, (c) => {
          const n = 4 * v + c;
          return n < SPLIT_PAGES * scores.setHeads ? `score${n}` : "0.0";
        }, ", ");
        return `exchange[team_scores + ${v * PAGE_TOKENS}u] = vec4<f32>(${of});`;
      })
    }
  workgroupBarrier();

  // The softmax of each head, by a team: a lane has its slot in both pages.
  let head = team;
  ${
      times(SPLIT_PAGES, (p) =>
        `let valid${p} = slot + ${p * PAGE_TOKENS}u < length;
  var scored${p} = LOWEST;`)
    }
  if (head < TILE) {
    let set_scores = head / ${scores.setHeads}u * ${scores.vectors * PAGE_TOKENS}u + slot;
    ${
      times(SPLIT_PAGES, (p) => {
        // Where a set has four heads, each page has a vector of its own.
        const [v, at] = scores.setHeads === 4
          ? [p, "head % 4u"]
          : [0, `${p * scores.setHeads}u + head % ${scores.setHeads}u`];
        const term = (part: number) =>
          `exchange[set_scores + ${
            (part * scores.sets * scores.vectors + v) * PAGE_TOKENS
          }u][${at}]`;
        return `scored${p} = select(LOWEST, ${pairwise(scores.parts, term)}, valid${p});`;
      })
    }
    queries[head / ${scores.setHeads}u][head % ${scores.setHeads}u][slot / 4u / ${scores.partQuads}u]` +
      `[slot / 4u % ${scores.partQuads}u][slot % 4u] = max(scored0, scored1);
  }
  workgroupBarrier();
  var maximum = LOWEST;
  if (head < TILE) {
    var largest = vec4<f32>(LOWEST);
    ${
        times(
          PAGE_TOKENS / 4,
          (i) =>
            `largest = max(largest, queries[head / ${scores.setHeads}u][head % ${scores.setHeads}u]${
              maxima(i)
            });`,
        )
      }
    maximum = max(max(largest.x, largest.y), max(largest.z, largest.w));
    ${
        times(SPLIT_PAGES, (p) => {
          const position = `(slot + ${p * PAGE_TOKENS}u)`;
          const at = dynamicComponent(values.setHeads, `head % ${values.setHeads}u`);
          return `let weight${p} = select(0.0, exp(scored${p} - maximum), valid${p});
    weights[${position} / ${values.runTokens}u][head / ${values.setHeads}u]` +
            `[${position} % ${values.runTokens}u]${at} = weight${p};`;
        })
      }
    sums[head][slot / 4u][slot % 4u] = weight0 + weight1;
  }
  workgroupBarrier();
  if (slot == 0u && head < heads_here) {
    let total = ${pairwise(PAGE_TOKENS / 4, (i) => `sums[head][${i}]`)};
    partials[partial_index(workgroup, first_head + head)] =
      vec4<f32>(maximum, (total.x + total.y) + (total.z + total.w), 0.0, 0.0);
  }

  // The weighted values of each run, then the runs put together.
  ${times(values.setHeads, (h) => `var weighted${h} = vec4<f32>();`, " ")}
  ${
        times(values.runTokens, (i) =>
          `{
    let weight = weights[run][value_set][${i}];
    let value = vec4<f32>(value${i});
    ${
            times(values.setHeads, (h) =>
              `weighted${h} += weight${component(values.setHeads, h)} * value;`)
          }
  }`)
      }
  ${
        [2, 1].filter((half) => 2 * half <= values.runs).map((half) => {
          const regions = values.runs / 2;
          const at = (run: string, h: number) =>
            `exchange[${run} % ${regions}u * ${heads * quads}u + value_lane + ${h * valueLanes}u]`;
          return `if (run >= ${half}u && run < ${2 * half}u) {
    ${times(values.setHeads, (h) => `${at("run", h)} = weighted${h};`)}
  }
  workgroupBarrier();
  if (run < ${half}u) {
    ${times(values.setHeads, (h) => `weighted${h} += ${at(`(run + ${half}u)`, h)};`)}
  }`;
        }).join("\n  ")
      }
  if (run == 0u) {
    let first = value_set * ${values.setHeads}u;
    ${
        times(values.setHeads, (h) =>
          `if (first + ${h}u < heads_here) {
      partials[partial_index(workgroup, first_head + first + ${h}u) + 1u + quad] = weighted${h};
    }`)
      }
  }
}

fn partial_index(workgroup: vec3<u32>, head: u32) -> u32 {
  return ((workgroup.z * HEADS + head) * batch_splits() + workgroup.x) * (1u + QUADS);
}
`,
  );
}
