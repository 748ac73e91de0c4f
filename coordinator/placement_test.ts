import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { randomInt, seededRandom } from "../shared/random.ts";
import {
  bottleneckMs,
  type Candidate,
  latencyMs,
  place,
  type Placement,
  type PlacementProblem,
} from "./placement.ts";

interface Figures {
  layerMs: number;
  headMs: number;
  hopMs: number;
  memory: number;
  firstBytes: number;
  lastBytes: number;
}

function candidate(figures: Figures): Candidate {
  const { layerMs, headMs, hopMs, memory, firstBytes, lastBytes } = figures;
  return {
    hopMs,
    stageMs: (layers, { last }) => layers * layerMs + (last ? headMs : 0),
    capacity: ({ first, last }) => memory - (first ? firstBytes : 0) - (last ? lastBytes : 0),
  };
}

function randomCandidates(random: () => number, count: number): Candidate[] {
  return Array.from({ length: count }, () =>
    candidate({
      layerMs: 1 + randomInt(random, 5),
      headMs: randomInt(random, 6),
      hopMs: randomInt(random, 4),
      memory: randomInt(random, 7),
      firstBytes: randomInt(random, 3),
      lastBytes: randomInt(random, 3),
    }));
}

/** Every placement there is: each ordered choice of workers with each composition of the layers. */
function* placements(problem: PlacementProblem): Generator<Placement> {
  const { candidates, layers } = problem;
  function* extend(chain: Placement, left: number): Generator<Placement> {
    for (let worker = 0; worker < candidates.length; worker++) {
      if (chain.some((share) => share.worker === worker)) continue;
      for (let count = 1; count <= left; count++) {
        const last = count === left;
        const share = { worker, layers: count, first: chain.length === 0, last };
        if (candidates[worker].capacity(share) < count) continue;
        if (last) yield [...chain, share];
        else yield* extend([...chain, share], left - count);
      }
    }
  }
  for (const placement of extend([], layers)) {
    if (problem.stages === undefined || placement.length === problem.stages) yield placement;
  }
}

function evenness(placement: Placement): number {
  const counts = placement.map((share) => share.layers);
  // A smaller largest stage first, then a larger smallest one.
  return Math.max(...counts) * 1e3 - Math.min(...counts);
}

Deno.test("place() finds what trying every placement finds", () => {
  const random = seededRandom(1);
  let possible = 0, impossible = 0;
  for (let round = 0; round < 300; round++) {
    const candidates = randomCandidates(random, 1 + randomInt(random, 4));
    const layers = 1 + randomInt(random, 6);
    const stages = random() < 0.4 ? 1 + randomInt(random, candidates.length) : undefined;
    const all = (problem: PlacementProblem) => [...placements(problem)];
    for (const objective of ["latency", "throughput"] as const) {
      const problem = { candidates, layers, objective, stages };
      const found = place(problem), others = all(problem);
      if (others.length === 0) {
        assertEquals(found, null, `round ${round}`);
        impossible++;
        continue;
      }
      possible++;
      assert(found, `round ${round}: no ${objective} placement was found`);
      const least = (cost: (p: Placement) => number, of: Placement[]) => Math.min(...of.map(cost));
      const slowest = (p: Placement) => bottleneckMs(candidates, p);
      const total = (p: Placement) => latencyMs(candidates, p);
      const rivals = objective === "latency"
        ? others
        : others.filter((p) => slowest(p) === least(slowest, others));
      if (objective === "throughput") assertEquals(slowest(found), least(slowest, others));
      assertAlmostEquals(total(found), least(total, rivals), 1e-9, `round ${round} ${objective}`);
      for (const share of found) assert(candidates[share.worker].capacity(share) >= share.layers);
      assertEquals(found.reduce((sum, share) => sum + share.layers, 0), layers);
    }
    const even = { candidates, layers, objective: "spread" } as const;
    const spread = place({ ...even, stages });
    const rivals = all({ ...even, stages: stages ?? Math.min(candidates.length, layers) });
    assertEquals(spread === null, rivals.length === 0, `round ${round} spread`);
    if (spread) assertEquals(evenness(spread), Math.min(...rivals.map(evenness)));
  }
  assert(possible > 100 && impossible > 20, `${possible} possible, ${impossible} impossible`);
});

Deno.test("place() leaves a worker out when it would slow the rest", () => {
  const fast = { layerMs: 1, headMs: 0, hopMs: 1, memory: 100, firstBytes: 0, lastBytes: 0 };
  const slow = { ...fast, layerMs: 50, hopMs: 20 };
  const candidates = [candidate(slow), candidate(fast), candidate(fast)];
  const throughput = place({ candidates, layers: 8, objective: "throughput" });
  assertEquals(throughput?.map(({ worker, layers }) => [worker, layers]), [[1, 4], [2, 4]]);
  const latency = place({ candidates, layers: 8, objective: "latency" });
  assertEquals(latency?.length, 1);
});

Deno.test("place() spreads layers evenly over as many stages as asked for", () => {
  const one = { layerMs: 1, headMs: 3, hopMs: 1, memory: 100, firstBytes: 0, lastBytes: 0 };
  const candidates = Array.from({ length: 5 }, () => candidate(one));
  const counts = (layers: number, stages?: number) =>
    place({ candidates, layers, objective: "spread", stages })?.map((share) => share.layers).sort();
  assertEquals(counts(8), [1, 1, 2, 2, 2]);
  assertEquals(counts(8, 3), [2, 3, 3]);
  assertEquals(counts(3), [1, 1, 1]);
});

Deno.test("place() is quick for 128 workers and 128 layers", () => {
  const random = seededRandom(5);
  const candidates = Array.from({ length: 128 }, () =>
    candidate({
      layerMs: 1 + random(),
      headMs: random(),
      hopMs: random(),
      memory: 1 + randomInt(random, 8),
      firstBytes: 1,
      lastBytes: 1,
    }));
  for (const objective of ["latency", "throughput", "spread"] as const) {
    const started = performance.now();
    assert(place({ candidates, layers: 128, objective }));
    const tookMs = performance.now() - started;
    // 10 to 600 ms on an idle machine. The bound only tells polynomial from exponential.
    assert(tookMs < 10_000, `${objective} took ${tookMs.toFixed(0)} ms`);
  }
});
