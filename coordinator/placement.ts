/**
 * How many layers each worker takes: an exact search by dynamic programming. Pure arithmetic on
 * costs and capacities; `planner.ts` makes those from workers and models and puts the result in words.
 *
 * Layers cost the same as each other, and a hop costs what its two ends cost apart, so all that the
 * order of the workers decides is who is first (embedding) and who is last (output head).
 *
 * @module
 */

/** Which ends of the model a stage holds. */
export interface Ends {
  first: boolean;
  last: boolean;
}

/** A worker, as far as placement is concerned. */
export interface Candidate {
  /** Time of one decode step of a stage of `layers` layers, hops apart, ms. Linear in `layers`. */
  stageMs: (layers: number, ends: Ends) => number;
  /** What its being in the pipeline adds to a token, ms: its hops. */
  hopMs: number;
  /** The most layers it has memory for; 0 or less when it cannot be such a stage. */
  capacity: (ends: Ends) => number;
}

/** What to look for. */
export interface PlacementProblem {
  candidates: readonly Candidate[];
  layers: number;
  objective: "latency" | "throughput" | "spread";
  /** Exactly this many stages. */
  stages?: number;
}

/** A worker's share: `worker` is its index among the candidates. */
export interface Share extends Ends {
  worker: number;
  layers: number;
}

/** The stages in pipeline order. */
export type Placement = Share[];

/** Flags of a search state: bit 0, somebody has the embedding; bit 1, somebody has the head. */
const FIRST = 1, LAST = 2, BOTH = 3, STATES = 4;

/**
 * The best placement, or null when there is none.
 *
 * - `latency`: the least sum of stage and hop times.
 * - `throughput`: the least time of the slowest stage; of all such placements, the least latency. So
 *   a worker that would not make the slowest stage faster is left out.
 * - `spread`: the most even layer counts; of all such placements, the least latency. Without
 *   `stages`, on all candidates.
 */
export function place(problem: PlacementProblem): Placement | null {
  switch (problem.objective) {
    case "latency":
      return search(problem, (_, ends, candidate) => [1, candidate.capacity(ends)]);
    case "throughput":
      return placeForThroughput(problem);
    case "spread":
      return placeEvenly(problem);
  }
}

/** The slowest stage's time, ms. */
export function bottleneckMs(candidates: readonly Candidate[], placement: Placement): number {
  return Math.max(
    ...placement.map((share) => candidates[share.worker].stageMs(share.layers, share)),
  );
}

/** The time of one token through the empty pipeline, ms. */
export function latencyMs(candidates: readonly Candidate[], placement: Placement): number {
  return placement.reduce((sum, share) => {
    const candidate = candidates[share.worker];
    return sum + candidate.stageMs(share.layers, share) + candidate.hopMs;
  }, 0);
}

/** Fewest and most layers that a candidate may take. */
type Range = (index: number, ends: Ends, candidate: Candidate) => [least: number, most: number];

function placeForThroughput(problem: PlacementProblem): Placement | null {
  const { candidates, layers } = problem;
  const under = (boundMs: number) =>
    search(problem, (_, ends, candidate) => {
      const most = Math.min(layers, candidate.capacity(ends));
      return [1, mostLayersUnder(candidate, ends, most, boundMs)];
    });
  const times = new Set<number>();
  for (const candidate of candidates) {
    for (const ends of ALL_ENDS) {
      const most = Math.min(layers, candidate.capacity(ends));
      for (let n = 1; n <= most; n++) times.add(candidate.stageMs(n, ends));
    }
  }
  const bounds = [...times].sort((a, b) => a - b);
  return leastThatWorks(bounds.length, (index) => under(bounds[index]));
}

function placeEvenly(problem: PlacementProblem): Placement | null {
  const { candidates, layers } = problem;
  const stages = problem.stages ?? Math.min(candidates.length, layers);
  const within = (least: number, most: number) =>
    search({ ...problem, stages }, (_, ends, candidate) => [
      least,
      Math.min(most, candidate.capacity(ends)),
    ]);
  // First the smallest largest stage, then the largest smallest one.
  const found = leastThatWorks(layers, (index) => within(1, index + 1));
  if (!found) return null;
  const most = Math.max(...found.map((share) => share.layers));
  const floor = Math.floor(layers / stages);
  return leastThatWorks(floor, (index) => within(floor - index, most));
}

/** What a stage of several can be, with its flags. Of equals the first worker is to be the first stage. */
const CHAIN_ENDS: [flags: number, ends: Ends][] = [
  [0, { first: false, last: false }],
  [LAST, { first: false, last: true }],
  [FIRST, { first: true, last: false }],
];
const ALL_ENDS: Ends[] = [...CHAIN_ENDS.map(([, ends]) => ends), { first: true, last: true }];

/** The most layers, up to `most`, that take at most `boundMs`. */
function mostLayersUnder(candidate: Candidate, ends: Ends, most: number, boundMs: number): number {
  let low = 0, high = Math.max(0, most);
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (candidate.stageMs(middle, ends) <= boundMs) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** `attempt(i)` of the least `i` in `[0, count)` that is not null, given that all above it work. */
function leastThatWorks<T>(count: number, attempt: (index: number) => T | null): T | null {
  let low = 0, high = count, best: T | null = null;
  while (low < high) {
    const middle = (low + high) >> 1;
    const found = attempt(middle);
    if (found !== null) {
      best = found;
      high = middle;
    } else low = middle + 1;
  }
  return best;
}

/** The placement of least latency with shares in the given ranges: on one worker, or on several. */
function search(problem: PlacementProblem, range: Range): Placement | null {
  const { candidates, layers, stages } = problem;
  const alone: Ends = { first: true, last: true };
  let best: Placement | null = null;
  for (const [worker, candidate] of candidates.entries()) {
    const [least, most] = range(worker, alone, candidate);
    if ((stages ?? 1) !== 1 || layers < least || layers > most) continue;
    const placement = [{ worker, layers, ...alone }];
    if (!best || latencyMs(candidates, placement) < latencyMs(candidates, best)) best = placement;
  }
  const several = searchChains(problem, range);
  if (!best || !several) return best ?? several;
  return latencyMs(candidates, several) < latencyMs(candidates, best) ? several : best;
}

/**
 * The best placement on two workers or more.
 *
 * A state says how many layers are placed, on how many stages, and which ends are taken; workers are
 * offered one after another. Because a share's cost is linear in its layers, its best size is a
 * sliding-window minimum: every state costs constant time.
 */
function searchChains(problem: PlacementProblem, range: Range): Placement | null {
  const { candidates, layers, stages } = problem;
  // Without a wish for the number of stages there is no need to count them.
  const counted = stages !== undefined;
  const counts = counted ? stages + 1 : 1;
  const width = layers + 1, size = counts * STATES * width;
  let best = new Float64Array(size).fill(Infinity);
  best[0] = 0;
  const table: Choice[] = [];
  for (const [index, candidate] of candidates.entries()) {
    const next = best.slice();
    const choice = { layers: new Uint16Array(size), ends: new Uint8Array(size) };
    // Stages so far: no more than workers so far, and enough that the rest can still make it.
    const fromCount = counted ? Math.max(0, stages - (candidates.length - index)) : 0;
    const toCount = counted ? Math.min(index, stages - 1) : 0;
    for (const [taken, ends] of CHAIN_ENDS) {
      const [least, most] = range(index, ends, candidate);
      if (most < least) continue;
      const fixed = candidate.hopMs + candidate.stageMs(0, ends);
      const perLayer = candidate.stageMs(1, ends) - candidate.stageMs(0, ends);
      for (let before = 0; before < STATES; before++) {
        if ((before & taken) !== 0) continue;
        for (let count = fromCount; count <= toCount; count++) {
          const from = (count * STATES + before) * width;
          const to = ((counted ? count + 1 : 0) * STATES + (before | taken)) * width;
          slide(best, { from, width, least, most, perLayer }, (placed, cost, share) => {
            if (cost + fixed >= next[to + placed]) return;
            next[to + placed] = cost + fixed;
            choice.layers[to + placed] = share;
            choice.ends[to + placed] = taken;
          });
        }
      }
    }
    table.push(choice);
    best = next;
  }
  if (!Number.isFinite(best[((counts - 1) * STATES + BOTH) * width + layers])) return null;
  return retrace(table, { layers, counts, counted });
}

/** Per state, what the worker took to reach it: 0 layers where the state was there before. */
interface Choice {
  layers: Uint16Array;
  ends: Uint8Array;
}

/**
 * For each number of layers placed: the least `best[from + placed - share] + share * perLayer` over
 * shares in `[least, most]`.
 */
function slide(
  best: Float64Array,
  options: { from: number; width: number; least: number; most: number; perLayer: number },
  found: (placed: number, cost: number, share: number) => void,
): void {
  const { from, width, least, most, perLayer } = options;
  // Indices with rising value of best[j] - j * perLayer; the front is the minimum of the window.
  const window: number[] = [];
  let front = 0;
  const value = (j: number) => best[from + j] - j * perLayer;
  for (let placed = least; placed < width; placed++) {
    const entering = placed - least;
    if (best[from + entering] < Infinity) {
      while (window.length > front && value(window[window.length - 1]) >= value(entering)) {
        window.pop();
      }
      window.push(entering);
    }
    while (front < window.length && window[front] < placed - most) front++;
    if (front < window.length) {
      const share = placed - window[front];
      found(placed, best[from + window[front]] + share * perLayer, share);
    }
  }
}

function retrace(
  table: readonly Choice[],
  goal: { layers: number; counts: number; counted: boolean },
): Placement {
  const width = goal.layers + 1;
  let placed = goal.layers, flags = BOTH, count = goal.counts - 1;
  const shares: Share[] = [];
  for (let worker = table.length - 1; worker >= 0; worker--) {
    const at = (count * STATES + flags) * width + placed;
    const layers = table[worker].layers[at];
    if (layers === 0) continue;
    const taken = table[worker].ends[at];
    shares.push({ worker, layers, first: (taken & FIRST) !== 0, last: (taken & LAST) !== 0 });
    placed -= layers;
    flags ^= taken;
    if (goal.counted) count--;
  }
  const rank = (share: Share) => share.first ? 0 : share.last ? 2 : 1;
  return shares.sort((a, b) => rank(a) - rank(b) || a.worker - b.worker);
}
