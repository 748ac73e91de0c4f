import { assertEquals, assertGreater } from "@std/assert";
import type { SchedulerConfig, SubmittedSequence } from "../../coordinator/scheduler.ts";
import { stepFrameBytes } from "../../shared/codec.ts";
import { LIMITS } from "../../shared/limits.ts";
import { type Random, randomInt, seededRandom } from "../../shared/random.ts";
import { expectedStream, VOCABULARY } from "./hash_model.ts";
import { type Faults, NO_FAULTS, SimulatedFleet } from "./simulated_fleet.ts";

function schedulerConfig(changes: Partial<SchedulerConfig> = {}): SchedulerConfig {
  const stages = changes.stages ?? 1;
  return {
    stages,
    maxStepsInFlight: 2 * stages,
    maxRows: 64,
    maxSequencesPerStep: 16,
    maxOutputs: 16,
    prefillRowsPerStep: 48,
    pages: 64,
    contextTokens: 256,
    maxQueuedSequences: 100,
    maxFrameBytes: LIMITS.maxFrameBytes,
    frameBytes: (shape) => stepFrameBytes({ ...shape, hiddenSize: 64, stages }),
    ...changes,
  };
}

function randomSequence(random: Random, id: string, longest: number): SubmittedSequence {
  const penalty = random() < 0.3 ? 0.5 : 0;
  const promptTokens = Uint32Array.from(
    { length: 1 + randomInt(random, longest) },
    () => randomInt(random, VOCABULARY),
  );
  return {
    id,
    promptTokens,
    maxTokens: 1 + randomInt(random, longest),
    temperature: random(),
    topP: 1,
    topK: 0,
    seed: (BigInt(randomInt(random, 2 ** 32)) << 32n) | BigInt(randomInt(random, 2 ** 32)),
    choice: randomInt(random, 3),
    presencePenalty: penalty,
    frequencyPenalty: 0,
    bias: new Map(random() < 0.3 ? [[randomInt(random, VOCABULARY), 1], [3, -1]] : []),
    alternatives: 0,
    stopTokens: [11, 12],
  };
}

interface Scene {
  random: Random;
  faults: Faults;
  sequences: SubmittedSequence[];
  config: SchedulerConfig;
  /** Chances per sequence of being cancelled, and per scene of new plans. */
  cancel?: number;
  replans?: SchedulerConfig[];
}

/** Plays a scene to its end and checks every stream against the model worked out directly. */
function play(scene: Scene): SimulatedFleet {
  const { random, sequences, config } = scene;
  const fleet = new SimulatedFleet({
    random,
    config,
    faults: scene.faults,
    hopMs: 1,
    stepMs: (batch) => 3 + batch.rowToken.length * 0.1,
  });
  for (const sequence of sequences) {
    fleet.clock.after(random() * 200, () => fleet.submit(sequence));
    if (random() < (scene.cancel ?? 0)) {
      fleet.clock.after(random() * 1500, () => fleet.cancel(sequence.id));
    }
  }
  for (const replan of scene.replans ?? []) {
    fleet.clock.after(random() * 1500, () => fleet.replan(replan));
  }
  fleet.run();
  for (const sequence of sequences) {
    const stream = fleet.streams.get(sequence.id)!;
    const expected = expectedStream(sequence, fleet.scheduler.contextTokens);
    if (stream.cancelled) {
      assertEquals(stream.tokens, expected.tokens.slice(0, stream.tokens.length));
    } else {
      assertEquals({ tokens: stream.tokens, reason: stream.end }, expected, sequence.id);
    }
  }
  const { running, waiting, pagesUsed, stepsInFlight } = fleet.scheduler.stats;
  assertEquals({ running, waiting, pagesUsed, stepsInFlight }, {
    running: 0,
    waiting: 0,
    pagesUsed: 0,
    stepsInFlight: 0,
  });
  return fleet;
}

function someSequences(random: Random, count: number, longest: number): SubmittedSequence[] {
  return Array.from({ length: count }, (_, i) => randomSequence(random, `s${i}`, longest));
}

/** Runs `scene` for many seeds; what fails says which seed. */
function forSeeds(count: number, scene: (random: Random, seed: number) => void): void {
  for (let seed = 1; seed <= count; seed++) {
    try {
      scene(seededRandom(seed), seed);
    } catch (error) {
      throw new Error(`seed ${seed}: ${(error as Error).message}`, { cause: error });
    }
  }
}

const LOSSY: Faults = { lose: 0.02, double: 0.05, delay: 0.05, delayMs: 40 };

Deno.test("streams are the same on 1, 2, 3 and 4 stages", () => {
  forSeeds(10, (random) => {
    const sequences = someSequences(random, 12, 60);
    for (const stages of [1, 2, 3, 4]) {
      play({ random, faults: NO_FAULTS, sequences, config: schedulerConfig({ stages }) });
    }
  });
});

Deno.test("streams are the same alone and in a full batch", () => {
  forSeeds(5, (random) => {
    const sequences = someSequences(random, 16, 60);
    const config = schedulerConfig({ stages: 2 });
    const together = play({ random, faults: NO_FAULTS, sequences, config });
    for (const sequence of sequences) {
      const alone = play({ random, faults: NO_FAULTS, sequences: [sequence], config });
      assertEquals(alone.streams.get(sequence.id), together.streams.get(sequence.id));
    }
  });
});

Deno.test("streams survive lost, doubled and delayed messages", () => {
  let reissues = 0;
  forSeeds(100, (random) => {
    const config = schedulerConfig({ stages: 1 + randomInt(random, 4) });
    reissues += play({ random, faults: LOSSY, sequences: someSequences(random, 8, 50), config })
      .reissues;
  });
  assertGreater(reissues, 100);
});

Deno.test("streams survive preemption when pages are short", () => {
  let preemptions = 0;
  forSeeds(30, (random) => {
    const config = schedulerConfig({
      stages: 1 + randomInt(random, 4),
      pages: 6 + randomInt(random, 6),
    });
    const sequences = someSequences(random, 10, 40).map((sequence) => ({
      ...sequence,
      maxTokens: 60 + randomInt(random, 60),
      stopTokens: [],
    }));
    const faults = random() < 0.5 ? LOSSY : NO_FAULTS;
    preemptions += play({ random, faults, sequences, config }).scheduler.stats.preemptions;
  });
  assertGreater(preemptions, 30);
});

Deno.test("streams go on bit for bit after new plans at any moment", () => {
  forSeeds(80, (random) => {
    const plan = () =>
      schedulerConfig({ stages: 1 + randomInt(random, 4), pages: 12 + randomInt(random, 30) });
    const replans = Array.from({ length: 1 + randomInt(random, 3) }, plan);
    play({
      random,
      faults: random() < 0.5 ? LOSSY : NO_FAULTS,
      sequences: someSequences(random, 10, 60),
      config: plan(),
      replans,
    });
  });
});

Deno.test("everything at once: faults, cancellations, few pages, tiny steps, new plans", () => {
  forSeeds(250, (random) => {
    const plan = () => {
      const maxRows = 1 + randomInt(random, 40);
      const maxSequencesPerStep = 1 + randomInt(random, Math.min(maxRows, 8));
      return schedulerConfig({
        stages: 1 + randomInt(random, 4),
        pages: 8 + randomInt(random, 24),
        maxRows,
        maxSequencesPerStep,
        maxOutputs: 1 + randomInt(random, maxSequencesPerStep),
        prefillRowsPerStep: 1 + randomInt(random, maxRows),
        maxFrameBytes: 3000 + randomInt(random, 20_000),
      });
    };
    play({
      random,
      faults: { ...LOSSY, lose: random() * 0.05 },
      sequences: someSequences(random, 8, 50),
      config: plan(),
      cancel: 0.3,
      replans: random() < 0.5 ? [plan()] : [],
    });
  });
});
