import { assert, assertEquals, assertRejects } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { StageChain } from "../model/stage_chain.ts";
import type { StageOutput, StageSteps, Ticket } from "../model/stage_spec.ts";
import { type RandomModel, randomModel, tinyConfig } from "../model/testing/random_model.ts";
import { systemClock, VirtualClock } from "../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import type { ResultFrame, StepBatch } from "../shared/frames.ts";
import { MemoryHub } from "../shared/memory_bus.ts";
import { stageParts } from "../shared/model_config.ts";
import { type AssignStage, COORDINATOR, PROTOCOL_VERSION, subjects } from "../shared/protocol.ts";
import { ModelLoader, modelRunner } from "./model_loader.ts";
import { createStage } from "./stage.ts";
import { batchOf, stepOf } from "./stage_fixture.ts";
import type { LoadNote } from "./worker.ts";

const FLEET = subjects("fleet");
const LIMITS = { maxRows: 8, maxSequences: 4, maxOutputs: 4, pages: 8, contextTokens: 64 };
const PROFILE = { version: 1, decode: "codegemm" } as const;

/** Stage `index` of a model that is cut in two, on a worker of each. */
function half(model: RandomModel, epoch: number, index: number): AssignStage {
  const { layers } = model.config;
  const stage = {
    index,
    stages: 2,
    from: index === 0 ? 0 : 1,
    to: index === 0 ? 1 : layers,
    first: index === 0,
    last: index === 1,
  };
  return {
    type: "assign",
    version: PROTOCOL_VERSION,
    instance: "i",
    epoch,
    config: model.configJson,
    modelDigest: "0".repeat(64),
    stage,
    previous: index === 0 ? COORDINATOR : "w0",
    next: index === 0 ? "w1" : COORDINATOR,
    parts: stageParts(stage).map((part, i) => ({
      part,
      digest: `${index}${i}`.padStart(64, "0"),
      bytes: 1000,
    })),
    limits: LIMITS,
    profile: PROFILE,
  };
}

Deno.test("two loaded stages on a bus compute what the model computes in one piece", async () => {
  const gpu = await Gpu.open({ software: true });
  const model = randomModel(
    tinyConfig({ ffnSize: 160, heads: 4, codegemm: { m: 1, v: 4, g: 32, b: 8 } }),
    5,
  );
  const hub = new MemoryHub({ clock: systemClock });
  const bus = hub.connect(COORDINATOR);
  const batches = [
    batchOf([{ sequence: 0, position: 0, token: 7 }, { sequence: 1, position: 0, token: 9 }]),
    batchOf([{ sequence: 0, position: 1, token: 8 }, { sequence: 1, position: 1, token: 3 }]),
    batchOf([{ sequence: 1, position: 2, token: 4 }, { sequence: 0, position: 2, token: 4 }]),
  ];
  const notes: LoadNote[] = [];
  const loaded = await Promise.all([0, 1].map(async (index) => {
    const assignment = half(model, 1, index);
    const parts = assignment.parts.map(() => ({ from: "cache" as const, tensors: model }));
    const stage = await new ModelLoader(gpu, systemClock)
      .load(assignment, model.config, parts, (note) => notes.push(note));
    const worker = `w${index}`;
    createStage({
      bus: hub.connect(worker),
      clock: systemClock,
      subjects: FLEET,
      worker,
      instance: "i",
      assignment,
      config: model.config,
      runner: stage.runner,
    });
    return stage;
  }));
  const told = notes.flatMap((note) => note.type === "part" ? [note.progress.part] : []);
  assertEquals([...new Set(told)].sort(), ["embedding", "head", "layer.0", "layer.1", "layer.2"]);
  assert(loaded.every(({ memoryBytes }) => memoryBytes > 0));

  const results: ResultFrame[] = [];
  const all = Promise.withResolvers<void>();
  bus.subscribe(FLEET.step(COORDINATOR, "*", "*"), ({ data }) => {
    results.push(decodeFrame(data) as ResultFrame);
    if (results.length === batches.length) all.resolve();
  });
  bus.subscribe(FLEET.report("*"), ({ data }) => all.reject(new TextDecoder().decode(data)));
  for (const [i, batch] of batches.entries()) {
    bus.publish(FLEET.step("w0", COORDINATOR, 1), encodeFrame(stepOf(i + 1, batch)));
  }
  await all.promise;

  const { config } = model;
  const chain = await StageChain.load({ gpu, config, tensors: model, limits: LIMITS });
  for (const [i, batch] of batches.entries()) {
    assertEquals(results[i].results, (await chain.step(batch)).results, `step ${i + 1}`);
  }
  chain.destroy();
  await Promise.all(loaded.map((stage) => stage.destroy()));
  gpu.check();
  gpu.close();
});

Deno.test("a loader keeps the parts that the next assignment names, and frees the others", async () => {
  const gpu = await Gpu.open({ software: true });
  const model = randomModel(tinyConfig(), 6);
  const loader = new ModelLoader(gpu, systemClock);
  const origins: string[][] = [];
  for (const [epoch, index] of [[1, 0], [2, 0], [3, 1], [4, 0]]) {
    const assignment = half(model, epoch, index);
    const parts = assignment.parts.map(() => ({ from: "cache" as const, tensors: model }));
    const ends = new Map<string, string>();
    const stage = await loader.load(assignment, model.config, parts, (note) => {
      if (note.type === "part") ends.set(note.progress.part, note.progress.from);
    });
    origins.push([...new Set(ends.values())]);
    await stage.destroy();
  }
  assertEquals(origins, [["cache"], ["gpu"], ["cache"], ["cache"]]);
  gpu.close();
});

Deno.test("a stage that is taken down with steps on the GPU leaves the device as it was", async () => {
  const gpu = await Gpu.open({ software: true });
  const model = randomModel(tinyConfig(), 6);
  const loader = new ModelLoader(gpu, systemClock);
  const load = (epoch: number) => {
    const assignment = half(model, epoch, 0);
    const parts = assignment.parts.map(() => ({ from: "cache" as const, tensors: model }));
    return loader.load(assignment, model.config, parts, () => {});
  };
  const step = batchOf([{ sequence: 0, position: 0, token: 1 }]);
  const batch = { ...step, requests: [] };
  const old = await load(1);
  const running = [old.runner.run(batch, null), old.runner.run(batch, null)];
  await old.destroy();
  await Promise.all(running);
  await assertRejects(() => old.runner.run(batch, null), FleetError, "taken down");
  const next = await load(2);
  await next.runner.run(batch, null);
  await next.destroy();
  gpu.check();
  gpu.close();
});

Deno.test("a stage whose kernels cannot be tuned is loaded with the default ones", async () => {
  const gpu = await Gpu.open({ software: true });
  const model = randomModel(tinyConfig(), 6);
  const loader = new ModelLoader(gpu, systemClock, {
    read: () => Promise.reject(new FleetError("disk", "the disk is gone")),
    write: () => Promise.resolve(),
  });
  const assignment = half(model, 1, 0);
  const parts = assignment.parts.map(() => ({ from: "cache" as const, tensors: model }));
  const lines: string[] = [];
  const stage = await loader.load(assignment, model.config, parts, (note) => {
    if (note.type === "line") lines.push(note.line);
  });
  assert(lines.some((line) => /untuned: the disk is gone/.test(line)), lines.join("\n"));
  await stage.destroy();
  gpu.close();
});

/** A model that takes note of what is asked of it. */
class LoggedModel implements StageSteps {
  readonly memoryBytes = 0;
  readonly log: string[] = [];
  /** When the step that runs will surely still be running. */
  endsAtMs = 0;
  #id = 0;
  readonly #clock: VirtualClock;

  constructor(clock: VirtualClock) {
    this.#clock = clock;
  }

  submit(_: StepBatch): Ticket {
    const id = this.#id++;
    this.log.push(`submit ${id}`);
    return { id };
  }

  prepare(): void {
    this.log.push("prepare");
  }

  settle(): void {
    this.log.push("settle");
  }

  busyForMs(): number {
    return this.endsAtMs - this.#clock.unixMs();
  }

  finish({ id }: Ticket): Promise<StageOutput> {
    this.log.push(`finish ${id}`);
    this.#clock.advance(10);
    return Promise.resolve({ hidden: null, results: [], gpuMs: 9, readbackMs: 1 });
  }

  destroy(): void {}
}

Deno.test("modelRunner() submits what has arrived before it waits, and counts the wait as queueing", async () => {
  const clock = new VirtualClock(), model = new LoggedModel(clock);
  const runner = modelRunner(model, clock);
  const batch = batchOf([{ sequence: 0, position: 0, token: 1 }]);
  const startMs = clock.unixMs();
  const outputs = await Promise.all([runner.run(batch, null), runner.run(batch, null)]);
  assertEquals(model.log, ["submit 0", "submit 1", "finish 0", "finish 1"]);
  assertEquals(outputs.map(({ startedAtMs }) => startedAtMs - startMs), [0, 10]);
});

Deno.test("modelRunner() looks after its mailbox until a step's end is near, then waits for the GPU", async () => {
  const clock = new VirtualClock(), model = new LoggedModel(clock);
  const batch = batchOf([{ sequence: 0, position: 0, token: 1 }]);
  const startMs = clock.unixMs();
  model.endsAtMs = startMs + 8;
  let second: Promise<unknown> | null = null;
  const runner = modelRunner(model, clock, {
    wait(ms) {
      model.log.push(`wait ${ms}`);
      clock.advance(Math.ceil(ms));
      // The next step comes while the first one runs.
      if (ms === 2) second = runner.run(batch, null);
      return Promise.resolve();
    },
  });
  await runner.run(batch, null);
  await second;
  assertEquals(model.log, [
    "submit 0",
    "wait 0",
    "prepare",
    "wait 4",
    "settle",
    "wait 2",
    "submit 1",
    "settle",
    "wait 1",
    "settle",
    "wait 0.5",
    "settle",
    "finish 0",
    "wait 0",
    "prepare",
    "finish 1",
  ]);
});
