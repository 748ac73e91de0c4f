// What every sampling kernel shares: the row's parameters, an order on floats, the best of a
// workgroup. A row of the vocabulary is split into chunks of 2048 tokens, by the vocabulary alone; a
// workgroup takes one chunk of one row, and one more workgroup per row brings the chunks together.
// Nothing depends on how many rows there are.

override vocab: u32;
/** Elements from one row of logits to the next, and before the first. */
override stride: u32;
override offset: u32;
/** ceil(vocab / CHUNK) */
override chunks: u32;

const WORKGROUP = 256u;
const CHUNK = 2048u;
const MAX_ALTERNATIVES = 20u;

const MODE_LOGITS = 0u;
const MODE_SCORE = 1u;
const MODE_GREEDY = 2u;
const MODE_DRAW = 3u;

struct Request {
  mode: u32,
  /** The token to score. */
  token: u32,
  inverse_temperature: f32,
  /** 1 is off. */
  top_p: f32,
  /** 0 is off. */
  top_k: u32,
  alternatives: u32,
  seed_low: u32,
  seed_high: u32,
  choice: u32,
  /** Of the token to draw. */
  position: u32,
  unused_a: u32,
  unused_b: u32,
}

/** What is known of a row so far. */
struct RowState {
  /** The largest logit, and the lowest token that has it. */
  largest: f32,
  token: u32,
  /** sum of exp(logit - largest) */
  sum: f32,
  /** The filters' search: the digit it stands at, keys found so far, and what is left to reach. */
  shift: u32,
  key_k: u32,
  left_k: u32,
  key_p: u32,
  left_p_high: u32,
  left_p_low: u32,
  unused_a: u32,
  unused_b: u32,
  unused_c: u32,
}

/** Results of a row: status, token, log-probability, log-sum-exp, then the alternatives. */
const RESULT_WORDS = 44u;
const RESULT_ALTERNATIVES = 4u;
const FINITE = 1u;
const NOT_FINITE = 2u;

const NO_TOKEN = 0xffffffffu;

/** Maps floats to u32 in their order; both zeros to one value. No finite float maps to 0. */
fn ordered(value: f32) -> u32 {
  let bits = select(bitcast<u32>(value), 0u, value == 0.0);
  return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn unordered(key: u32) -> f32 {
  return bitcast<f32>(select(~key, key & 0x7fffffffu, (key & 0x80000000u) != 0u));
}

/** By bits: compilers may assume that floats are finite. */
fn is_finite(value: f32) -> bool {
  return (bitcast<u32>(value) & 0x7f800000u) != 0x7f800000u;
}

/** The token of a chunk that a thread takes as its i-th of 8: two runs of four. */
fn token_at(chunk: u32, thread: u32, i: u32) -> u32 {
  return chunk * CHUNK + (i >> 2u) * (4u * WORKGROUP) + thread * 4u + (i & 3u);
}

/** A candidate: a key to make large, and at equal keys the lower token. */
fn better(a: vec2<u32>, b: vec2<u32>) -> bool {
  return a.x > b.x || (a.x == b.x && a.y < b.y);
}

var<workgroup> bests: array<vec2<u32>, WORKGROUP>;

/**
 * The best candidate of the workgroup, known to all its threads. In two levels of 16, as barriers are
 * what costs on a CPU and what a tree of eight levels would save on a GPU is nothing.
 */
fn best_of_workgroup(thread: u32, mine: vec2<u32>) -> vec2<u32> {
  bests[thread] = mine;
  workgroupBarrier();
  if (thread < 16u) {
    for (var at = thread + 16u; at < WORKGROUP; at += 16u) {
      if (better(bests[at], bests[thread])) { bests[thread] = bests[at]; }
    }
  }
  workgroupBarrier();
  var best = bests[0];
  for (var at = 1u; at < 16u; at++) {
    if (better(bests[at], best)) { best = bests[at]; }
  }
  workgroupBarrier();
  return best;
}
