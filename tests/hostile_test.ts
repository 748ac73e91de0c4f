/**
 * Bad input over real sockets: strangers on a real nats-server, clients that misbehave at a real
 * listener, and checkpoints that a coordinator process must refuse.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import denoJson from "../deno.json" with { type: "json" };
import { taskArgs } from "../cli/processes.ts";
import { createApi } from "../coordinator/api/mod.ts";
import { watchDisconnects } from "../coordinator/disconnects.ts";
import { Fleet } from "../coordinator/fleet.ts";
import { Metrics } from "../coordinator/metrics.ts";
import type { FleetSnapshot } from "../coordinator/snapshot.ts";
import type { Bus } from "../shared/bus.ts";
import { systemClock } from "../shared/clock.ts";
import { LIMITS } from "../shared/limits.ts";
import { connectNats } from "../shared/nats_bus.ts";
import { DISCONNECT_SUBJECT } from "../shared/nats_config.ts";
import { encodeControl, subjects } from "../shared/protocol.ts";
import type { FleetWorker } from "../worker/worker.ts";
import { byteTokenizer, serveOnLoopback } from "./api_fixture.ts";
import { startNatsServer, type TestServer } from "./nats_server.ts";
import { simulatedModel, simulatedWorker } from "./simulated_fleet.ts";

const PREFIX = "test";
const FLEET = subjects(PREFIX);
const DEMO = new URL("../models/story-16m-m1v4g128/", import.meta.url);
const STEP_MS = 2;

/** A fleet on a real nats-server behind a real listener, with integers in place of the model. */
class NatsFleet implements AsyncDisposable {
  readonly url: string;
  readonly port: number;
  readonly fleet: Fleet;
  readonly log: string[] = [];
  readonly workers = new Map<string, { bus: Bus; worker: FleetWorker<null> }>();
  readonly #nats: TestServer;
  readonly #bus: Bus;
  readonly #stopServing: () => Promise<void>;
  readonly #buses: Bus[] = [];
  #instances = 0;

  private constructor(nats: TestServer, bus: Bus) {
    this.#nats = nats;
    this.#bus = bus;
    let epoch = 0;
    this.fleet = new Fleet({
      bus,
      clock: systemClock,
      prefix: PREFIX,
      model: simulatedModel(),
      nextEpoch: () => Promise.resolve(++epoch),
      contextTokens: 256,
      sequences: 32,
      objective: "throughput",
      stages: 2,
      profile: { version: 1, decode: "codegemm" },
      log: ({ text }) => this.log.push(text),
    });
    watchDisconnects(bus, (name) => this.fleet.disconnected(name));
    const app = createApi({
      engine: this.fleet,
      tokenizer: byteTokenizer,
      chatTemplate: null,
      clock: systemClock,
      randomSeed: () => 7n,
      apiKeys: [],
      metrics: new Metrics(),
      log: (_, text) => this.log.push(text),
    });
    const { url, port, stop } = serveOnLoopback(app);
    this.url = url;
    this.port = port;
    this.#stopServing = stop;
    this.fleet.start();
  }

  static async start(): Promise<NatsFleet> {
    const nats = await startNatsServer({ prefix: PREFIX });
    const { bus } = await connectNats({ url: nats.url, name: "coordinator" });
    const fleet = new NatsFleet(nats, bus);
    for (const name of ["w1", "w2"]) await fleet.join(name);
    await fleet.until(({ state }) => state === "serving");
    return fleet;
  }

  /** Another process of this name. */
  async join(name: string): Promise<void> {
    const bus = await this.connect(name);
    const instance = `${name}-${this.#instances++}`;
    const clock = systemClock;
    const worker = simulatedWorker({ bus, clock, prefix: PREFIX, name, instance, stepMs: STEP_MS });
    worker.join();
    this.workers.get(name)?.worker.close();
    this.workers.set(name, { bus, worker });
  }

  async connect(name: string): Promise<Bus> {
    const { bus } = await connectNats({ url: this.#nats.url, name });
    this.#buses.push(bus);
    return bus;
  }

  /** The answer of `GET /fleet`. */
  async look(): Promise<FleetSnapshot> {
    return await (await fetch(`${this.url}/fleet`)).json();
  }

  async until(condition: (snapshot: FleetSnapshot) => boolean): Promise<FleetSnapshot> {
    for (const deadline = performance.now() + 10_000;;) {
      const snapshot = await this.look();
      if (condition(snapshot)) return snapshot;
      assert(performance.now() < deadline, `${JSON.stringify(snapshot)}\n${this.log.join("\n")}`);
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }

  post(body: unknown, signal?: AbortSignal): Promise<Response> {
    return fetch(`${this.url}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "simulated", ...body as object }),
      signal,
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.fleet.stop();
    await this.#stopServing();
    for (const { worker } of this.workers.values()) worker.close();
    for (const bus of [...this.#buses, this.#bus]) await bus.close();
    await this.#nats.stop();
  }
}

/** Streams four requests at once; what each yields, logprobs included. */
async function streams(fleet: NatsFleet): Promise<string[]> {
  const requests = [1, 2, 3, 4].map((seed) => ({
    prompt: Array.from({ length: 20 * seed }, (_, i) => 2 + i * seed % 900),
    max_tokens: 60,
    temperature: seed % 2,
    seed,
    logprobs: 0,
    stream: true,
  }));
  return await Promise.all(requests.map(async (request) => {
    const response = await fleet.post(request);
    assertEquals(response.status, 200);
    const lines = (await response.text()).split("\n").filter((line) => line.startsWith("data: {"));
    const chunks = lines.map((line) => JSON.parse(line.slice("data: ".length)));
    assertEquals(chunks.at(-1).choices[0].finish_reason, "length", JSON.stringify(chunks.at(-1)));
    return JSON.stringify(chunks.map(({ choices }) => choices));
  }));
}

/** Writes bytes to the listener as they are, and reads what comes until it closes or falls silent. */
async function rawRequest(port: number, ...pieces: (string | Uint8Array)[]): Promise<string> {
  const connection = await Deno.connect({ hostname: "127.0.0.1", port });
  const encoder = new TextEncoder();
  let answer = "";
  const reading = (async () => {
    const decoder = new TextDecoder();
    for await (const chunk of connection.readable) {
      answer += decoder.decode(chunk, { stream: true });
      if (/\r\n\r\n.*\}/s.test(answer)) return;
    }
  })().catch(() => {});
  const writer = connection.writable.getWriter();
  try {
    for (const piece of pieces) {
      await writer.write(typeof piece === "string" ? encoder.encode(piece) : piece);
    }
  } catch {
    // The server has said its word and hung up.
  }
  await reading;
  try {
    connection.close();
  } catch { /* The server was first. */ }
  return answer;
}

const HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";

Deno.test("strangers on NATS and clients at the API: the fleet stays up, and tells", async (t) => {
  await using fleet = await NatsFleet.start();
  const calm = await streams(fleet);
  const { plan } = await fleet.look();

  await t.step("rubbish on every subject changes no stream", async () => {
    const bus = await fleet.connect("stranger");
    const { epoch } = plan!;
    const heard: { subject: string; data: Uint8Array }[] = [];
    const listening = bus.subscribe(`${PREFIX}.step.>`, ({ subject, data }) => {
      if (heard.length < 50) heard.push({ subject, data });
    });
    const big = new Uint8Array(LIMITS.maxFrameBytes).fill(0x41);
    const small = crypto.getRandomValues(new Uint8Array(500));
    const gap = { type: "gap", instance: "w2-1", epoch, attempt: 1, expected: 1, got: 2 };
    const everywhere = ["w1", "w2", "nobody"].flatMap((worker) => [
      ...[FLEET.hello(worker), FLEET.beat(worker), FLEET.report(worker), FLEET.ctl(worker)],
      ...["coordinator", "nobody"].map((from) => FLEET.step(worker, from, epoch)),
      ...[epoch, epoch + 1].map((epoch) => FLEET.step("coordinator", worker, epoch)),
    ]);
    let going = true;
    const flood = (async () => {
      for (let i = 0; going; i++) {
        for (const subject of everywhere) bus.publish(subject, small);
        if (i % 5 === 0) bus.publish(everywhere[i % everywhere.length], big);
        for (const { subject, data } of heard.slice(i % 40, i % 40 + 10)) {
          bus.publish(subject, data);
        }
        bus.publish(FLEET.report("w2"), encodeControl(gap));
        bus.publish(DISCONNECT_SUBJECT, encodeControl({ client: { name: "w1" } }));
        bus.publish(DISCONNECT_SUBJECT, small);
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    })();
    assertEquals(await streams(fleet), calm);
    going = false;
    await flood;
    listening.unsubscribe();
    const snapshot = await fleet.until(({ workers }) =>
      workers[0].dropped.malformed > 0 &&
      workers.every(({ dropped }) => dropped["wrong-sender"] > 0)
    );
    assertEquals(snapshot.plan!.epoch, epoch, fleet.log.join("\n"));
    for (const reason of ["malformed-message", "malformed-frame", "wrong-sender"]) {
      assert(snapshot.dropped[reason] > 5, JSON.stringify(snapshot.dropped));
    }
    const metrics = await (await fetch(`${fleet.url}/metrics`)).text();
    assertMatch(metrics, /fleet_coordinator_dropped_total\{reason="malformed-frame"\} \d+/);
    assert(snapshot.events.length < 100 && fleet.log.length < 200, `${fleet.log.length} lines`);
  });

  await t.step("a connection that ends is a loss only if nobody answers to its name", async () => {
    const before = (await fleet.look()).plan!.epoch;
    for (const name of ["w1", "w1-transfer"]) await (await fleet.connect(name)).close();
    assertEquals(await streams(fleet), calm);
    assertEquals((await fleet.look()).plan!.epoch, before);
    await fleet.workers.get("w2")!.bus.close();
    const lost = await fleet.until(({ events }) =>
      events.some(({ text }) => /w2 is lost/.test(text))
    );
    assert(lost.events.some(({ text }) => text === "w2 is lost: its connection to NATS ended"));
    await fleet.join("w2");
    await fleet.until(({ state, plan }) => state === "serving" && plan!.stages.length === 2);
    assertEquals(await streams(fleet), calm);
  });

  await t.step("bodies that are no request are refused, over a real connection", async () => {
    const invalid = new Uint8Array([...new TextEncoder().encode('{"prompt":"'), 0xff, 0xfe, 0x22]);
    const cases: [answer: RegExp, string[], ...(string | Uint8Array)[]][] = [
      [/^HTTP\/1.1 400 .*is not JSON/s, ["Content-Length: 5"], "{oops"],
      [/^HTTP\/1.1 400 .*not valid UTF-8/s, [`Content-Length: ${invalid.length}`], invalid],
      [
        /^HTTP\/1.1 400 .*"param":"prompt"/s,
        ["Content-Length: 32"],
        '{"model":"simulated","prompt":1}',
      ],
      [/^HTTP\/1.1 413 .*longer than/s, ["Content-Length: 9000000000"], "{"],
    ];
    for (const [answer, headers, ...body] of cases) {
      const head = `${HEAD}${headers.join("\r\n")}\r\n\r\n`;
      assertMatch(await rawRequest(fleet.port, head, ...body), answer);
    }
    const chunk = `10000\r\n${" ".repeat(0x10000)}\r\n`;
    const chunks = Array.from({ length: 100 }, () => chunk);
    const head = `${HEAD}Transfer-Encoding: chunked\r\n\r\n`;
    assertMatch(await rawRequest(fleet.port, head, ...chunks), /^HTTP\/1.1 413 .*longer than/s);
    const long = await fleet.post({ prompt: "x".repeat(300) });
    assertEquals(long.status, 400);
    assertEquals((await long.json()).error.code, "context_length_exceeded");
  });

  await t.step("clients that leave or do not read give their pages back", async () => {
    const leaving = Array.from({ length: 8 }, () => new AbortController());
    for (const abort of leaving) {
      const { body } = await fleet.post(
        { prompt: "x", max_tokens: 250, stream: true },
        abort.signal,
      );
      await body!.getReader().read();
    }
    const idle = await Deno.connect({ hostname: "127.0.0.1", port: fleet.port });
    const body = JSON.stringify({
      ...{ model: "simulated", prompt: "x", n: 16, max_tokens: 120, stream: true, logprobs: 20 },
    });
    const head = `${HEAD}Content-Length: ${body.length}\r\n\r\n${body}`;
    await idle.write(new TextEncoder().encode(head));
    await fleet.until(({ load }) => load.running >= 20);
    for (const abort of leaving) abort.abort();
    await fleet.until(({ load }) => load.running <= 16);
    assertEquals(await streams(fleet), calm);
    await fleet.until(({ load }) => load.running + load.waiting + load.pagesUsed === 0);
    idle.close();
  });

  await t.step("past the last place there is a 429 that says when to come back", async () => {
    const abort = new AbortController();
    const prompts = Array.from({ length: 64 }, (_, i) => [2 + i]);
    const full = fleet.post({ prompt: prompts, n: 16, max_tokens: 250 }, abort.signal);
    full.catch(() => {});
    await fleet.until(({ load }) => load.running + load.waiting === LIMITS.maxQueuedSequences);
    const refused = await fleet.post({ prompt: "x" });
    assertEquals([refused.status, refused.headers.get("retry-after")], [429, "1"]);
    assertEquals((await refused.json()).error.code, "overloaded");
    abort.abort();
    await fleet.until(({ load }) => load.running + load.waiting + load.pagesUsed === 0);
    assertEquals(await streams(fleet), calm);
  });
});

/** The demo checkpoint in a directory of its own, damaged by `damage`. */
async function damaged(damage: (directory: string) => Promise<void>): Promise<string> {
  const directory = await Deno.makeTempDir({ prefix: "codegemm-fleet-damaged-" });
  for await (const { name, isFile } of Deno.readDir(DEMO)) {
    if (isFile) await Deno.copyFile(new URL(name, DEMO), `${directory}/${name}`);
  }
  await damage(directory);
  return directory;
}

/** What a coordinator process says of a checkpoint, and its exit code. */
async function coordinatorOf(natsUrl: string, model: string) {
  const { code, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      ...taskArgs(denoJson.tasks, "coordinator"),
      ...["--nats", natsUrl, "--model", model, "--port", "0", "--prefix", PREFIX],
    ],
    cwd: new URL("../", import.meta.url),
    stdin: "null",
    stdout: "null",
  }).output();
  return { code, lines: new TextDecoder().decode(stderr).trim().split("\n") };
}

Deno.test("a coordinator refuses a damaged checkpoint in one line", async (t) => {
  await using nats = await startNatsServer({ prefix: PREFIX });
  const SHARD = "model-00001-of-00001.safetensors";
  const cases: [what: string, damage: (directory: string) => Promise<void>, words: RegExp][] = [
    ["a missing shard", (directory) => Deno.remove(`${directory}/${SHARD}`), /00001.* is missing/],
    [
      "a truncated shard",
      async (directory) => {
        const { size } = await Deno.stat(`${directory}/${SHARD}`);
        await Deno.truncate(`${directory}/${SHARD}`, size - 1000);
      },
      /00001/,
    ],
    [
      "a config that does not match its tensors",
      async (directory) => {
        const config = JSON.parse(await Deno.readTextFile(`${directory}/config.json`));
        config.intermediate_size *= 2;
        await Deno.writeTextFile(`${directory}/config.json`, JSON.stringify(config));
      },
      /mlp.*1024.*2048|mlp.*2048.*1024/,
    ],
    [
      "NaN scales",
      async (directory) => {
        using file = await Deno.open(`${directory}/${SHARD}`, { read: true, write: true });
        const length = new Uint8Array(8);
        await file.read(length);
        const headerBytes = Number(new DataView(length.buffer).getBigUint64(0, true));
        const bytes = new Uint8Array(headerBytes);
        for (let at = 0; at < headerBytes;) at += await file.read(bytes.subarray(at)) ?? 0;
        const header = JSON.parse(new TextDecoder().decode(bytes));
        const name = "model.layers.3.self_attn.q_proj.scales";
        const at = 8 + headerBytes + header[name].data_offsets[0] + 2 * 5;
        await file.seek(at, Deno.SeekMode.Start);
        await file.write(new Uint8Array([0x00, 0x7e]));
      },
      /model\.layers\.3\.self_attn\.q_proj\.scales: element 5 is not a finite number/,
    ],
  ];
  for (const [what, damage, words] of cases) {
    await t.step(what, async () => {
      const directory = await damaged(damage);
      try {
        const { code, lines } = await coordinatorOf(nats.url, directory);
        assertEquals(lines.length, 1, lines.join("\n"));
        assertMatch(lines[0], words);
        assert(code !== 0);
      } finally {
        await Deno.remove(directory, { recursive: true });
      }
    });
  }
});
