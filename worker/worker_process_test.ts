import { assert, assertEquals, assertLess, assertStringIncludes } from "@std/assert";
import denoJson from "../deno.json" with { type: "json" };
import { type RandomModel, randomModel, tinyConfig } from "../model/testing/random_model.ts";
import { StageChain } from "../model/stage_chain.ts";
import { Gpu } from "../kernels/gpu.ts";
import { encodeSafetensors, memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import type { Frame, RowResult, StepBatch } from "../shared/frames.ts";
import { LIMITS as FLEET_LIMITS } from "../shared/limits.ts";
import { stageParts } from "../shared/model_config.ts";
import { connectNats, type NatsLink } from "../shared/nats_bus.ts";
import { describeParts } from "../shared/parts.ts";
import {
  type AssignStage,
  Beat,
  ControlReply,
  COORDINATOR,
  decodeControl,
  encodeControl,
  PROTOCOL_VERSION,
  subjects,
  WorkerCard,
  WorkerReport,
} from "../shared/protocol.ts";
import { publishParts } from "../shared/weights.ts";
import { startNatsServer, type TestServer } from "../tests/nats_server.ts";
import { batchOf, stepOf } from "./stage_fixture.ts";

const ROOT = new URL("../", import.meta.url).pathname;
const FLEET = subjects("test");
const LIMITS = { maxRows: 8, maxSequences: 4, maxOutputs: 4, pages: 8, contextTokens: 64 };
const PROFILE = { version: 1, decode: "codegemm" } as const;

/** A worker process with the very permissions of `deno task worker`. */
class WorkerProcess {
  readonly lines: string[] = [];
  readonly status: Promise<Deno.CommandStatus>;
  readonly #child: Deno.ChildProcess;
  readonly #read: Promise<void[]>;

  constructor(args: string[], env: Record<string, string> = {}) {
    const task = denoJson.tasks.worker.split(" ").slice(1);
    this.#child = new Deno.Command(Deno.execPath(), {
      args: [...task, ...args],
      cwd: ROOT,
      env: { NO_COLOR: "1", ...env },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.#read = Promise.all([this.#child.stdout, this.#child.stderr].map(async (stream) => {
      for await (const text of stream.pipeThrough(new TextDecoderStream())) this.lines.push(text);
    }));
    this.status = this.#child.status;
  }

  get output(): string {
    return this.lines.join("");
  }

  /** Its exit status and how long it took to end. */
  async stop(signal: Deno.Signal): Promise<{ code: number; ms: number }> {
    const startMs = performance.now();
    this.#child.kill(signal);
    const { code } = await this.ended();
    return { code, ms: performance.now() - startMs };
  }

  async ended(): Promise<Deno.CommandStatus> {
    const status = await this.status;
    await this.#read;
    return status;
  }
}

/** Everything a worker says, and what can be waited for. */
class Ear {
  readonly cards: WorkerCard[] = [];
  readonly reports: WorkerReport[] = [];
  readonly beats: Beat[] = [];
  readonly frames: Frame[] = [];
  #changed = Promise.withResolvers<void>();

  constructor(readonly link: NatsLink) {
    const hear = (subject: string, handler: (data: Uint8Array) => void) =>
      link.bus.subscribe(subject, ({ data }) => {
        handler(data);
        this.#changed.resolve();
        this.#changed = Promise.withResolvers();
      });
    hear(FLEET.hello("*"), (data) => this.cards.push(decodeControl(WorkerCard, data)));
    hear(FLEET.report("*"), (data) => this.reports.push(decodeControl(WorkerReport, data)));
    hear(FLEET.beat("*"), (data) => this.beats.push(decodeControl(Beat, data)));
    hear(FLEET.step(COORDINATOR, "*", "*"), (data) => this.frames.push(decodeFrame(data)));
  }

  /** Waits until the coordinator's own connection is back. */
  async untilConnected(): Promise<void> {
    if (this.link.bus.status === "connected") await this.link.bus.flush().catch(() => {});
    while (this.link.bus.status !== "connected") {
      const changed = Promise.withResolvers<void>();
      const subscription = this.link.bus.onStatus(() => changed.resolve());
      await changed.promise;
      subscription.unsubscribe();
    }
  }

  /** Waits for a condition, or for the process to end before it holds. */
  async until(condition: () => boolean, worker: WorkerProcess): Promise<void> {
    let ended = false;
    worker.status.then(() => ended = true);
    while (!condition()) {
      assert(!ended, `the worker ended:\n${worker.output}`);
      await Promise.race([this.#changed.promise, worker.status]);
    }
  }
}

async function withServer(
  test: (server: TestServer, ear: Ear, directory: string) => Promise<void>,
): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "codegemm-fleet-worker-" });
  const server = await startNatsServer({ workers: ["w1"] });
  try {
    const link = await connectNats({
      url: server.url,
      name: COORDINATOR,
      credentialsFile: server.credentialsFile(COORDINATOR),
    });
    await test(server, new Ear(link), directory);
    await link.bus.close();
  } finally {
    await server.stop();
    await Deno.remove(directory, { recursive: true });
  }
}

/** A checkpoint of random weights, in memory. */
async function tinyCheckpoint() {
  const model = randomModel(
    tinyConfig({ layers: 2, ffnSize: 160, heads: 4, codegemm: { m: 1, v: 4, g: 32, b: 8 } }),
    21,
  );
  const tensors = await Promise.all(
    model.names().map(async (name) => {
      const info = model.info(name);
      return { ...info, data: await model.read(name, 0, info.bytes) };
    }),
  );
  const files = {
    "config.json": model.configJson,
    "model.safetensors": encodeSafetensors(tensors),
  };
  return { model, files, checkpoint: await openCheckpoint(memorySource(files)) };
}

Deno.test("a worker process joins, fetches its stage over NATS, serves a step, and leaves", () =>
  withServer(async (server, ear, directory) => {
    const { model, checkpoint } = await tinyCheckpoint();
    const described = await describeParts(checkpoint);
    const { connection, bus } = ear.link;
    await publishParts({ connection, bucket: FLEET.bucket, tensors: checkpoint, model: described });
    const args = [
      ...["--nats", server.url, "--prefix", "test", "--software", "--memory", "256MiB"],
      ...["--credentials", server.credentialsFile("w1"), "--cache", `${directory}/cache`],
    ];
    const worker = new WorkerProcess(args);
    await ear.until(() => ear.cards.length > 0, worker);
    const [card] = ear.cards;
    // The name comes from the credentials, for they permit no other.
    assertEquals([card.worker, card.memoryBytes, card.cachedParts], ["w1", 256 * 2 ** 20, []]);

    const stage = { index: 0, stages: 1, from: 0, to: 2, first: true, last: true };
    const assignment: AssignStage = {
      type: "assign",
      version: PROTOCOL_VERSION,
      instance: card.instance,
      epoch: 5,
      config: model.configJson,
      modelDigest: described.digest,
      stage,
      previous: COORDINATOR,
      next: COORDINATOR,
      parts: described.parts.map(({ ref }) => ref),
      limits: LIMITS,
      profile: PROFILE,
    };
    assertEquals(assignment.parts.map(({ part }) => part), stageParts(stage));
    const answer = await bus.request(FLEET.ctl("w1"), encodeControl(assignment), 2000);
    assertEquals(decodeControl(ControlReply, answer).type, "ok");
    const ended = () => ear.reports.find(({ type }) => type === "ready" || type === "failed");
    await ear.until(() => ended() !== undefined, worker);
    assertEquals(ended()?.type, "ready", worker.output);
    assert(ear.reports.some((report) => report.type === "progress" && report.from === "store"));

    const batch = batchOf([
      { sequence: 0, position: 0, token: 7 },
      { sequence: 0, position: 1, token: 8 },
      { sequence: 1, position: 0, token: 9 },
    ]);
    const frame = encodeFrame(stepOf(1, batch, { epoch: 5 }));
    bus.publish(FLEET.step("w1", COORDINATOR, 5), frame);
    await ear.until(() => ear.frames.length > 0, worker);
    const [result] = ear.frames;
    assert(result.type === "result" && result.epoch === 5 && result.step === 1);
    assertEquals(result.results, await inOnePiece(model, batch));
    // Two threads' accounts of one clock.
    const [{ receivedAtMs, startedAtMs, sentAtMs }] = result.traces;
    assertLess(receivedAtMs, startedAtMs + 5);
    assertLess(startedAtMs, sentAtMs + 5);
    const beats = ear.beats.length;
    await ear.until(() => ear.beats.length > beats, worker);
    assertEquals([ear.beats.at(-1)!.state, ear.beats.at(-1)!.epoch], ["serving", 5]);

    // Neither the load nor the steps, both of which block the GPU thread, held up a beat.
    const sentAt = ear.beats.map((beat) => beat.sentAtMs);
    const longest = Math.max(...sentAt.slice(1).map((at, i) => at - sentAt[i]));
    assertLess(longest, FLEET_LIMITS.deadAfterMs);

    // NATS goes and comes back: whoever is heard first, the worker is found and goes on.
    await server.restart();
    const cards = ear.cards.length;
    await ear.untilConnected();
    bus.publish(FLEET.call, new Uint8Array());
    await ear.until(() => ear.cards.length > cards, worker);
    bus.publish(
      FLEET.step("w1", COORDINATOR, 5),
      encodeFrame(stepOf(2, batchOf([{ sequence: 1, position: 1, token: 3 }]), { epoch: 5 })),
    );
    await ear.until(() => ear.frames.length > 1, worker);
    assertEquals(ear.frames[1].step, 2);

    const { code, ms } = await worker.stop("SIGTERM");
    assertEquals(code, 0, worker.output);
    assertLess(ms, 1500);
    assert(ear.reports.some(({ type }) => type === "leaving"));

    // The next process of the same cache has every part at hand.
    const next = new WorkerProcess([...args, "--name", "w1"]);
    const newest = () => ear.cards.at(-1)!;
    await ear.until(() => newest().instance !== card.instance, next);
    const digests = described.parts.map(({ ref }) => ref.digest);
    assertEquals([...newest().cachedParts].sort(), digests.sort());
    assertEquals((await next.stop("SIGINT")).code, 0, next.output);
  }));

/** What the model answers without a fleet around it. */
async function inOnePiece(model: RandomModel, batch: StepBatch): Promise<RowResult[]> {
  const gpu = await Gpu.open({ software: true });
  const { config } = model;
  const chain = await StageChain.load({ gpu, config, tensors: model, limits: LIMITS });
  const { results } = await chain.step(batch);
  chain.destroy();
  gpu.close();
  return results;
}

Deno.test("a worker process that cannot join ends with the reason", () =>
  withServer(async (server, _, directory) => {
    await Deno.writeTextFile(`${directory}/wrong`, "w1:wrong");
    const nats = ["--nats", server.url],
      credentials = ["--credentials", server.credentialsFile("w1")];
    const cases: [args: string[], reason: string, code: number][] = [
      [["--nats", "ws://127.0.0.1:1"], "Nothing answers at ws://127.0.0.1:1", 1],
      [["--nats", "nats://127.0.0.1:1"], "ws://", 2],
      [[...nats, "--credentials", `${directory}/wrong`], "refused the credentials", 1],
      [["--name", "a.b"], "cannot be a worker's name", 2],
      [["--memory", "lots"], "--memory takes a size", 2],
      [[...nats, ...credentials, "--software", "--cache", "/proc/none"], "--cache DIR", 1],
      [
        [...nats, ...credentials, "--name", "w2", "--software", "--cache", directory],
        "not those of the worker w2",
        1,
      ],
    ];
    if (await onlySoftware()) {
      cases.push([[...nats, ...credentials, "--cache", directory], "pass --software", 1]);
    }
    for (const [args, reason, code] of cases) {
      const worker = new WorkerProcess(args);
      assertEquals((await worker.ended()).code, code, worker.output);
      assertStringIncludes(worker.output, reason);
    }
  }));

async function onlySoftware(): Promise<boolean> {
  const gpu = await Gpu.open({ software: true });
  gpu.close();
  return gpu.info.software;
}
