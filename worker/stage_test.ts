import { assert, assertEquals, assertGreater } from "@std/assert";
import { VirtualClock } from "../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import type { Frame, ResultFrame, RowResult, StepFrame } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import { type BusFaults, MemoryHub } from "../shared/memory_bus.ts";
import { COORDINATOR, decodeControl, subjects, WorkerReport } from "../shared/protocol.ts";
import { randomInt, seededRandom } from "../shared/random.ts";
import { createStage, type Stage } from "./stage.ts";
import {
  batchOf,
  chainStage,
  HIDDEN,
  type Row,
  settle,
  SimulatedRunner,
  stepOf,
} from "./stage_fixture.ts";

const FLEET = subjects("fleet");

/** A chain of simulated stages on one hub, and what the coordinator hears of it. */
class Chain {
  readonly clock = new VirtualClock();
  readonly hub: MemoryHub;
  readonly bus;
  readonly runners: SimulatedRunner[];
  readonly stages: Stage[];
  readonly failures: FleetError[] = [];
  readonly frames: Frame[] = [];
  readonly reports: WorkerReport[] = [];
  readonly names: string[];

  constructor(stages: number, options: { seed?: number; stepMs?: number } = {}) {
    const { clock } = this;
    this.hub = new MemoryHub({ clock, seed: options.seed, latencyMs: 1 });
    this.bus = this.hub.connect(COORDINATOR);
    this.names = Array.from({ length: stages }, (_, i) => `w${i}`);
    this.bus.subscribe(`fleet.step.${COORDINATOR}.>`, ({ data }) => {
      this.frames.push(decodeFrame(data));
    });
    this.bus.subscribe("fleet.report.*", ({ data }) => {
      this.reports.push(decodeControl(WorkerReport, data));
    });
    this.runners = this.names.map((_, i) =>
      new SimulatedRunner(clock, { stepMs: options.stepMs ?? 10, last: i === stages - 1 })
    );
    this.stages = this.names.map((worker, i) =>
      createStage({
        bus: this.hub.connect(worker),
        clock,
        subjects: FLEET,
        worker,
        instance: `${worker}-1`,
        assignment: chainStage(this.names, i, 1),
        config: { hiddenSize: HIDDEN, vocabSize: 100 },
        runner: this.runners[i],
        onFailure: (error) => this.failures.push(error),
      })
    );
  }

  send(frame: Frame, to = "w0", from = COORDINATOR, epoch = frame.epoch): void {
    this.bus.publish(FLEET.step(to, from, epoch), encodeFrame(frame));
  }

  async advance(ms: number): Promise<void> {
    for (let i = 0; i < ms; i++) {
      this.clock.advance(1);
      await settle();
    }
  }

  get results(): ResultFrame[] {
    return this.frames.filter((frame) => frame.type === "result");
  }
}

const one = (position: number, token = 5): Row => ({ sequence: 0, position, token });

Deno.test("a chain of stages passes activations on and sends the result to the coordinator", async () => {
  const chain = new Chain(3);
  chain.send(stepOf(1, batchOf([one(0), one(1), { sequence: 1, position: 0, token: 9 }])));
  await chain.advance(40);
  const [result] = chain.results;
  assertEquals([result.epoch, result.attempt, result.step, result.issuedAtMs], [1, 1, 1, 1000]);
  assertEquals(result.results.map(({ row }) => row), [1, 2]);
  assertEquals(result.traces.map((trace) => trace.gpuMs), [10, 10, 10]);
  const startMs = chain.clock.unixMs() - 40;
  assertEquals(result.traces.map((trace) => trace.receivedAtMs - startMs), [1, 12, 23]);
  assertEquals(result.traces.map((trace) => trace.sentAtMs - startMs), [11, 22, 33]);
  assertEquals(chain.reports, []);
});

Deno.test("a stage keeps two steps at its runner, the rest in its queue, and sends them in order", async () => {
  const chain = new Chain(1);
  for (let step = 1; step <= 5; step++) chain.send(stepOf(step, batchOf([one(step - 1)])));
  await chain.advance(60);
  assertEquals(chain.results.map(({ step }) => step), [1, 2, 3, 4, 5]);
  assertEquals(chain.runners[0].most, LIMITS.maxStepsInFlightPerStage);
  const waits = chain.results.map(({ traces: [t] }) => t.startedAtMs - t.receivedAtMs);
  assertEquals(waits, [0, 10, 20, 30, 40]);
});

Deno.test("a stage reports a gap at once and goes on with the next attempt", async () => {
  const chain = new Chain(1);
  chain.send(stepOf(1, batchOf([one(0)])));
  chain.send(stepOf(3, batchOf([one(2)])));
  await chain.advance(2);
  assertEquals(chain.reports, [
    { type: "gap", instance: "w0-1", epoch: 1, attempt: 1, expected: 2, got: 3 },
  ]);
  for (const step of [2, 3]) {
    chain.send(stepOf(step, batchOf([one(step - 1)]), { attempt: 2, attemptBase: 2 }));
  }
  await chain.advance(40);
  assertEquals(chain.results.map(({ attempt, step }) => [attempt, step]), [[1, 1], [2, 2], [2, 3]]);
  assertEquals(chain.stages[0].dropped, { gap: 1 });
});

Deno.test("a newer attempt voids the steps that still wait for the runner", async () => {
  const chain = new Chain(1);
  for (const step of [1, 2, 3, 4]) chain.send(stepOf(step, batchOf([one(step - 1)])));
  await chain.advance(2);
  for (const step of [1, 2, 3, 4]) {
    chain.send(stepOf(step, batchOf([one(step - 1)]), { attempt: 2 }));
  }
  await chain.advance(80);
  assertEquals(chain.stages[0].dropped, { superseded: 2 });
  assertEquals(
    chain.results.map(({ attempt, step }) => [attempt, step]),
    [[1, 1], [1, 2], [2, 1], [2, 2], [2, 3], [2, 4]],
  );
});

Deno.test("a stage drops and counts what is not for it, and touches no page", async () => {
  const chain = new Chain(2);
  const good = stepOf(1, batchOf([one(0)]));
  const hidden = new Uint16Array(HIDDEN);
  const bad = (batch: StepFrame["batch"]) => chain.send(stepOf(1, batch));
  chain.send(good, "w0", "w1");
  chain.send({ ...good, epoch: 2 });
  chain.send({ ...good, epoch: 0 });
  chain.send(good, "w0", COORDINATOR, 3);
  chain.send({ ...good, epoch: 2 }, "w0", COORDINATOR, 1);
  chain.send({ ...good, type: "result", results: [] });
  chain.bus.publish(FLEET.step("w0", COORDINATOR, 1), new Uint8Array(99));
  chain.bus.publish(FLEET.step("w0", COORDINATOR, "x"), encodeFrame(good));
  bad(batchOf([one(0, 100)]));
  bad(batchOf([{ sequence: 4, position: 0, token: 1 }]));
  bad({ ...batchOf([one(0)]), sequences: [{ pages: new Uint32Array(5) }] });
  bad({ ...batchOf([one(0)]), requests: [{ type: "score", row: 0, token: 100 }] });
  bad(batchOf(Array.from({ length: 17 }, (_, position) => one(position))));
  chain.send({ ...good, hidden });
  chain.send(good, "w1", "w0");
  await chain.advance(40);
  assertEquals(chain.stages[0].dropped, {
    "wrong-sender": 1,
    "future-epoch": 2,
    "old-epoch": 1,
    "malformed": 4,
    "out-of-bounds": 6,
  });
  assertEquals(chain.stages[1].dropped, { "out-of-bounds": 1 });
  assertEquals(chain.runners.map((runner) => runner.slots.size), [0, 0]);
  assertEquals(chain.results, []);
  chain.send(good);
  await chain.advance(40);
  assertEquals(chain.results.length, 1);
});

Deno.test("a full queue drops the step and reports it missing", async () => {
  const chain = new Chain(1, { stepMs: 1000 });
  const bound = LIMITS.maxQueuedFramesPerStage;
  for (let step = 1; step <= bound + 2; step++) {
    chain.send(stepOf(step, batchOf([{ sequence: 0, position: 0, token: step }])));
  }
  await chain.advance(2);
  assertEquals(chain.stages[0].dropped, { "queue-full": 1, "gap": 1 });
  assertEquals(chain.reports.map((r) => r.type === "gap" && [r.expected, r.got]), [
    [bound + 1, bound + 1],
  ]);
});

Deno.test("a failure of the runner is reported, and no frame is touched after it", async () => {
  const chain = new Chain(1);
  chain.runners[0].failure = new FleetError("gpu", "device lost: unplugged");
  chain.send(stepOf(1, batchOf([one(0)])));
  chain.send(stepOf(2, batchOf([one(1)])));
  chain.send(stepOf(3, batchOf([one(2)])));
  await chain.advance(30);
  assertEquals(chain.reports, [
    { type: "failed", instance: "w0-1", epoch: 1, code: "gpu", message: "device lost: unplugged" },
  ]);
  assertEquals(chain.failures.map(({ code }) => code), ["gpu"]);
  chain.runners[0].failure = null;
  chain.send(stepOf(1, batchOf([one(0)]), { attempt: 2 }));
  await chain.advance(30);
  assertEquals(chain.results, []);
  assertEquals(chain.runners[0].steps, 0);
  assertEquals(chain.stages[0].dropped, { failed: 1 });
});

Deno.test("a closed stage hears and says nothing more", async () => {
  const chain = new Chain(1);
  chain.send(stepOf(1, batchOf([one(0)])));
  await chain.advance(5);
  chain.stages[0].close();
  chain.send(stepOf(2, batchOf([one(1)])));
  await chain.advance(30);
  assertEquals([chain.results, chain.reports, chain.stages[0].dropped], [[], [], {}]);
});

/** 24 steps of three sequences that grow by one to three rows each. */
function script(seed: number): StepFrame[] {
  const random = seededRandom(seed);
  const lengths = [0, 0, 0];
  return Array.from({ length: 24 }, (_, i) => {
    const rows = [0, 1, 2].filter(() => random() < 0.7).flatMap((sequence) =>
      Array.from({ length: 1 + randomInt(random, 3) }, () => ({
        sequence,
        position: lengths[sequence]++,
        token: randomInt(random, 100),
      }))
    );
    return stepOf(
      i + 1,
      batchOf(rows.length > 0 ? rows : [{ sequence: 0, position: lengths[0]++, token: 1 }]),
    );
  });
}

/**
 * The least that a coordinator must do: keep a window of steps in flight, and on a gap or a deadline
 * raise the attempt and reissue what is unfinished.
 */
async function serve(chain: Chain, steps: StepFrame[]): Promise<RowResult[][]> {
  const results = new Map<number, RowResult[]>();
  let attempt = 1, attemptBase = 1, issued = 0, quietMs = 0, heard = 0, told = 0;
  const unfinished = () => steps.findIndex(({ step }) => !results.has(step)) + 1;
  const issue = (step: number) => chain.send({ ...steps[step - 1], attempt, attemptBase });
  while (results.size < steps.length) {
    for (const frame of chain.results.slice(heard)) {
      heard++;
      if (!results.has(frame.step)) results.set(frame.step, frame.results);
      quietMs = 0;
    }
    const gap = chain.reports.slice(told).some((r) => r.type === "gap" && r.attempt === attempt);
    told = chain.reports.length;
    if (results.size < steps.length && (gap || quietMs > 100)) {
      attempt++;
      attemptBase = unfinished();
      for (let step = attemptBase; step <= issued; step++) issue(step);
      quietMs = 0;
    }
    while (issued < steps.length && issued - results.size < 6) issue(++issued);
    await chain.advance(1);
    quietMs++;
    assert(attempt < 400, "the chain makes no progress");
  }
  return steps.map(({ step }) => results.get(step)!);
}

Deno.test("a bus that loses, doubles and delays frames changes no result of a chain", async () => {
  const faults: BusFaults = { lose: 0.04, double: 0.2, delay: 0.2, maxDelayMs: 60 };
  for (const seed of [1, 2, 3]) {
    const steps = script(seed);
    const calm = await serve(new Chain(3, { stepMs: 2 }), steps);
    const chain = new Chain(3, { seed, stepMs: 2 });
    chain.hub.faults = faults;
    assertEquals(await serve(chain, steps), calm, `seed ${seed}`);
    assertGreater(chain.hub.counts.lost, 0);
    assertGreater(chain.hub.counts.doubled, 0);
    assertEquals(chain.failures, []);
  }
});
