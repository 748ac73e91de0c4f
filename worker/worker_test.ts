import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { VirtualClock } from "../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import type { Frame } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import { type MemoryBus, MemoryHub } from "../shared/memory_bus.ts";
import { stageParts } from "../shared/model_config.ts";
import {
  type AssignStage,
  Beat,
  ControlReply,
  COORDINATOR,
  decodeControl,
  encodeControl,
  type PartRef,
  PROTOCOL_VERSION,
  subjects,
  WorkerCard,
  WorkerReport,
} from "../shared/protocol.ts";
import { batchOf, BOUNDS, settle, SimulatedRunner, stepOf } from "./stage_fixture.ts";
import { FleetWorker, type PartProgress } from "./worker.ts";

const FLEET = subjects("fleet");
const INSTANCE = "w0-1";
const digest = (n: number) => n.toString(16).padStart(64, "0");

const CARD: Omit<WorkerCard, "cachedParts"> = {
  version: PROTOCOL_VERSION,
  worker: "w0",
  instance: INSTANCE,
  host: "host",
  gpu: { name: "simulated", software: true },
  memoryBytes: 1e9,
  maxBindingBytes: 1e8,
  selfTestDigest: digest(1),
  calibration: {
    denseBytesPerMs: 1,
    codegemmBytesPerMs: 1,
    wideCodeBytesPerMs: 1,
    overheadMsPerLayer: 0,
  },
};

const CONFIG = JSON.stringify({
  model_type: "llama",
  hidden_size: 64,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  intermediate_size: 128,
  vocab_size: 100,
  max_position_embeddings: 128,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  tie_word_embeddings: false,
});

function assignment(epoch: number, more: Partial<AssignStage> = {}): AssignStage {
  const stage = { index: 0, stages: 1, from: 0, to: 2, first: true, last: true };
  return {
    type: "assign",
    version: PROTOCOL_VERSION,
    instance: INSTANCE,
    epoch,
    config: CONFIG,
    modelDigest: digest(9),
    stage,
    previous: COORDINATOR,
    next: COORDINATOR,
    parts: stageParts(more.stage ?? stage).map((part, i) => ({
      part,
      digest: digest(i),
      bytes: 1000,
    })),
    limits: BOUNDS,
    profile: { version: 1, decode: "codegemm" },
    ...more,
  };
}

/** A worker with hand-driven parts and loads, and what the coordinator hears of it. */
class Scene {
  readonly clock = new VirtualClock();
  readonly hub = new MemoryHub({ clock: this.clock });
  readonly bus: MemoryBus = this.hub.connect("w0");
  readonly coordinator = this.hub.connect(COORDINATOR);
  readonly cards: WorkerCard[] = [];
  readonly beats: Beat[] = [];
  readonly reports: WorkerReport[] = [];
  readonly frames: Frame[] = [];
  readonly runners: SimulatedRunner[] = [];
  /** Loads that wait to be let go, and stages freed so far. */
  readonly loads: { epoch: number; go: () => void; fail: (error: Error) => void }[] = [];
  readonly destroyed: number[] = [];
  readonly failures: FleetError[] = [];
  readonly worker: FleetWorker<string>;

  constructor() {
    const hear = (subject: string, handler: (data: Uint8Array) => void) =>
      this.coordinator.subscribe(subject, ({ data }) => handler(data));
    hear("fleet.hello.*", (data) => this.cards.push(decodeControl(WorkerCard, data)));
    hear("fleet.beat.*", (data) => this.beats.push(decodeControl(Beat, data)));
    hear("fleet.report.*", (data) => this.reports.push(decodeControl(WorkerReport, data)));
    hear(`fleet.step.${COORDINATOR}.>`, (data) => this.frames.push(decodeFrame(data)));
    this.worker = new FleetWorker<string>({
      bus: this.bus,
      clock: this.clock,
      subjects: FLEET,
      card: CARD,
      parts: { held: () => [digest(7)], provide: (parts, tell) => this.#provide(parts, tell) },
      loader: { load: ({ epoch }) => this.#load(epoch) },
      onFailure: (error) => this.failures.push(error),
    });
    this.worker.join();
  }

  async #provide(parts: PartRef[], tell: (progress: PartProgress) => void): Promise<string[]> {
    await Promise.resolve();
    for (const { part, bytes } of parts) {
      for (const doneBytes of [0, bytes / 2, bytes]) {
        tell({ part, doneBytes, from: "store" });
      }
    }
    return parts.map(({ digest }) => digest);
  }

  #load(epoch: number) {
    return new Promise<{ runner: SimulatedRunner; memoryBytes: number; destroy(): Promise<void> }>(
      (resolve, reject) => {
        const runner = new SimulatedRunner(this.clock, { stepMs: 1, last: true });
        const loaded = {
          runner,
          memoryBytes: 1,
          destroy: () => Promise.resolve(void this.destroyed.push(epoch)),
        };
        this.runners.push(runner);
        this.loads.push({ epoch, go: () => resolve(loaded), fail: reject });
      },
    );
  }

  async advance(ms: number): Promise<void> {
    for (let i = 0; i < ms; i++) {
      this.clock.advance(1);
      await settle();
    }
  }

  async ask(request: unknown): Promise<ControlReply> {
    const answer = this.coordinator.request(FLEET.ctl("w0"), encodeControl(request), 1000);
    await this.advance(2);
    return decodeControl(ControlReply, await answer);
  }

  /** Assigns and lets the load finish. */
  async serve(epoch: number): Promise<void> {
    assertEquals((await this.ask(assignment(epoch))).type, "ok");
    this.loads.at(-1)!.go();
    await this.advance(2);
  }

  /** The first step of an epoch. */
  step(epoch: number): void {
    const batch = batchOf([{ sequence: 0, position: 0, token: 3 }]);
    const frame = encodeFrame(stepOf(1, batch, { epoch }));
    this.coordinator.publish(FLEET.step("w0", COORDINATOR, epoch), frame);
  }

  reported(type: WorkerReport["type"]): WorkerReport[] {
    return this.reports.filter((report) => report.type === type);
  }
}

Deno.test("a worker says hello when it joins, at every roll call, and after a reconnect", async () => {
  const scene = new Scene();
  await scene.advance(1);
  assertEquals(scene.cards, [{ ...CARD, cachedParts: [digest(7)] }]);
  scene.coordinator.publish(FLEET.call, new Uint8Array());
  await scene.advance(200);
  assertEquals(scene.cards.length, 2);
  scene.bus.cut();
  await scene.advance(10);
  scene.bus.restore();
  await scene.advance(2);
  assertEquals(scene.cards.length, 3);
});

Deno.test("a worker beats on time, whatever it is doing", async () => {
  const scene = new Scene();
  await scene.advance(350);
  assertEquals(scene.beats.map(({ sequence }) => sequence), [0, 1, 2, 3]);
  assertEquals([scene.beats[3].state, scene.beats[3].epoch], ["idle", 0]);
  await scene.ask(assignment(4));
  await scene.advance(LIMITS.beatEveryMs);
  assertEquals([scene.beats.at(-1)!.state, scene.beats.at(-1)!.epoch], ["loading", 4]);
});

Deno.test("an assignment is accepted at once, then loaded, reported ready, and served", async () => {
  const scene = new Scene();
  assertEquals((await scene.ask(assignment(4))).type, "ok");
  assertEquals(scene.reported("ready"), []);
  const progress = scene.reported("progress").map((r) =>
    r.type === "progress" && [r.part, r.doneBytes, r.totalBytes]
  );
  // Nothing in between, for no time passes; the end always.
  assertEquals(progress, [["embedding", 0, 4000], ["head", 4000, 4000]]);
  await scene.advance(50);
  scene.loads[0].go();
  await scene.advance(2);
  const [ready] = scene.reported("ready");
  assert(ready.type === "ready" && ready.epoch === 4 && ready.loadMs >= 50);
  scene.step(4);
  await scene.advance(5);
  assertEquals(scene.frames.map(({ type, epoch, step }) => [type, epoch, step]), [[
    "result",
    4,
    1,
  ]]);
  assertEquals(scene.worker.state, "serving");
});

Deno.test("an assignment that cannot be is refused with the reason", async () => {
  const scene = new Scene();
  const reason = async (more: Partial<AssignStage>, epoch = 4) => {
    const reply = await scene.ask(assignment(epoch, more));
    return reply.type === "refused" ? reply.reason : "accepted";
  };
  const half = { index: 0, stages: 2, from: 0, to: 1, first: true, last: false };
  assertStringIncludes(await reason({ version: 99 }), "speaks protocol");
  assertStringIncludes(await reason({ config: "{" }), "configuration");
  assertStringIncludes(await reason({ stage: { ...half, to: 3 } }), "has 2 layers");
  assertStringIncludes(await reason({ stage: { ...half, last: true } }), "cannot hold");
  assertStringIncludes(await reason({ stage: { ...half, index: 1 } }), "cannot hold");
  assertStringIncludes(await reason({ parts: [] }), "consists of embedding, layer.0");
  const malformed = await scene.ask({ type: "assign", epoch: "four" });
  assert(malformed.type === "refused");
  assertEquals(scene.worker.state, "idle");
  await scene.serve(4);
  assertStringIncludes(await reason({}, 3), "not newer than 4");
  assertEquals(await reason({}, 4), "accepted");
  assertEquals(scene.loads.length, 1);
});

Deno.test("orders for another process of its name are left to that one to answer", async () => {
  const scene = new Scene();
  const answers = [
    scene.ask(assignment(4, { instance: "w0-0" })),
    scene.ask({ type: "release", instance: "w0-0", epoch: 4 }),
  ].map((answer) => answer.then(() => "answered", (error: FleetError) => error.code));
  await scene.advance(20_000);
  assertEquals(await Promise.all(answers), ["timeout", "timeout"]);
  assertEquals(scene.worker.state, "idle");
});

Deno.test("a roll that is called without end is answered at a decent distance", async () => {
  const scene = new Scene();
  await scene.advance(1_000);
  const before = scene.cards.length;
  for (let i = 0; i < 1_000; i++) {
    scene.coordinator.publish(FLEET.call, new Uint8Array([i]));
    await scene.advance(1);
  }
  const cards = scene.cards.length - before;
  assertEquals(cards >= 4 && cards <= 6, true, `${cards} cards in a second`);
});

Deno.test("a newer epoch replaces one that serves, and one that still loads", async () => {
  const scene = new Scene();
  await scene.serve(4);
  await scene.ask(assignment(5));
  assertEquals(scene.destroyed, [4]);
  assertEquals((await scene.ask(assignment(6))).type, "ok");
  assertEquals(scene.loads.map(({ epoch }) => epoch), [4, 5]);
  scene.loads[1].go();
  await scene.advance(2);
  assertEquals(scene.destroyed, [4, 5]);
  scene.loads[2].go();
  await scene.advance(2);
  assertEquals(scene.reported("ready").map((r) => r.type === "ready" && r.epoch), [4, 6]);
  assertEquals([scene.worker.state, scene.worker.epoch], ["serving", 6]);
});

Deno.test("release stops serving, frees the pages, and a newer epoch may follow", async () => {
  const scene = new Scene();
  await scene.serve(4);
  const release = (epoch: number) => scene.ask({ type: "release", instance: INSTANCE, epoch });
  assertEquals((await release(3)).type, "ok");
  assertEquals(scene.worker.state, "serving");
  assertEquals((await release(4)).type, "ok");
  assertEquals([scene.worker.state, scene.worker.epoch, scene.destroyed], ["idle", 0, [4]]);
  assertEquals((await scene.ask(assignment(4))).type, "refused");
  await scene.serve(5);
  assertEquals(scene.worker.state, "serving");
});

Deno.test("a load that fails is reported, and the worker stands ready for the next plan", async () => {
  const scene = new Scene();
  await scene.ask(assignment(4));
  scene.loads[0].fail(new FleetError("out-of-memory", "no memory for the weights"));
  await scene.advance(2);
  assertEquals(scene.reported("failed"), [{
    type: "failed",
    instance: INSTANCE,
    epoch: 4,
    code: "out-of-memory",
    message: "no memory for the weights",
  }]);
  assertEquals([scene.worker.state, scene.worker.epoch], ["failed", 4]);
  await scene.serve(5);
  assertEquals(scene.worker.state, "serving");
});

Deno.test("a worker that cannot go on says why, once", async () => {
  const scene = new Scene();
  await scene.serve(4);
  const gone = new FleetError("gpu", "device lost: unplugged");
  scene.worker.fail(gone);
  scene.worker.fail(gone);
  await scene.advance(2);
  assertEquals(scene.reported("failed").map((r) => r.type === "failed" && [r.epoch, r.code]), [
    [4, "gpu"],
  ]);
  assertEquals([scene.worker.state, scene.destroyed], ["failed", [4]]);
});

Deno.test("a runner's failure is told to the fleet and to the process", async () => {
  const scene = new Scene();
  await scene.serve(4);
  scene.runners[0].failure = new FleetError("gpu", "device lost: unplugged");
  scene.step(4);
  await scene.advance(5);
  assertEquals(scene.reported("failed").length, 1);
  assertEquals(scene.failures.map(({ code }) => code), ["gpu"]);
  assertEquals(scene.worker.state, "failed");
});

Deno.test("how an assignment ended is told again after a reconnect, and when it is asked again", async () => {
  const scene = new Scene();
  await scene.ask(assignment(4));
  scene.bus.cut();
  scene.loads[0].go();
  await scene.advance(10);
  assertEquals(scene.reported("ready"), []);
  scene.bus.restore();
  await scene.advance(2);
  assertEquals(scene.reported("ready").length, 1);
  assertEquals((await scene.ask(assignment(4))).type, "ok");
  assertEquals(scene.reported("ready").length, 2);
  assertEquals(scene.loads.length, 1);
});

Deno.test("ping tells the worker's clock", async () => {
  const scene = new Scene();
  const reply = await scene.ask({ type: "ping", sentAtMs: 1 });
  assert(reply.type === "ok" && Math.abs(reply.nowMs - scene.clock.unixMs()) < 10);
});

Deno.test("a worker that leaves says so, frees its stage, and falls silent", async () => {
  const scene = new Scene();
  await scene.serve(4);
  await scene.worker.leave();
  await scene.advance(2);
  assertEquals(scene.reported("leaving"), [{ type: "leaving", instance: INSTANCE }]);
  assertEquals(scene.destroyed, [4]);
  const beats = scene.beats.length;
  await scene.advance(500);
  assertEquals(scene.beats.length, beats);
});
