/**
 * Whatever anybody sends: streams go on unchanged, epochs and pages are left alone, and `/fleet` tells
 * what happened. In simulated time, with the real coordinator and the real workers.
 */
import { assert, assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import type { GenerateRequest } from "../coordinator/engine.ts";
import { FleetError } from "../shared/errors.ts";
import type { RowResult } from "../shared/frames.ts";
import { encodeControl, PROTOCOL_VERSION, subjects } from "../shared/protocol.ts";
import { seededRandom } from "../shared/random.ts";
import type { StageRunner } from "../worker/stage.ts";
import { PREFIX, SimulatedFleet, type SimulationOptions, type Temper } from "./simulated_fleet.ts";

const FLEET = subjects(PREFIX);

/** Eight requests, greedy and sampled, long enough that trouble finds them running. */
const REQUESTS: Partial<GenerateRequest>[] = Array.from({ length: 8 }, (_, i) => ({
  promptTokens: Uint32Array.from({ length: 5 + 17 * i }, (_, at) => 2 + (at * 7 + i) % 900),
  maxTokens: 20 + 3 * i,
  temperature: i % 2,
  seed: BigInt(i),
}));

/** What they yield when nobody disturbs. */
async function expectedTokens(): Promise<number[][]> {
  const calm = await serving(await fleetOf({ w1: {} }));
  return await calm.generate(REQUESTS) as number[][];
}
const expected = await expectedTokens();

async function fleetOf(
  workers: Record<string, Temper>,
  options: SimulationOptions = {},
): Promise<SimulatedFleet> {
  const stages = Object.keys(workers).length;
  const simulated = new SimulatedFleet({ ...options, fleet: { stages, ...options.fleet } });
  for (const [name, temper] of Object.entries(workers)) simulated.join(name, temper);
  await simulated.until(() => simulated.fleet.snapshot().plan !== null);
  return simulated;
}

async function serving(simulated: SimulatedFleet): Promise<SimulatedFleet> {
  await simulated.until(() => simulated.fleet.snapshot().state === "serving");
  return simulated;
}

/** Runs the requests while `mischief` is done every millisecond; all must come out as expected. */
async function undisturbed(simulated: SimulatedFleet, mischief: () => void): Promise<void> {
  const epoch = simulated.fleet.snapshot().plan!.epoch;
  const streams = REQUESTS.map((request) => simulated.start(request));
  const strike = () => {
    mischief();
    timer = simulated.clock.after(1, strike);
  };
  let timer = simulated.clock.after(1, strike);
  await simulated.until(() => streams.every((stream) => stream.ended));
  timer.cancel();
  assertEquals(streams.map(({ tokens }) => tokens), expected);
  const { plan, load, events } = simulated.fleet.snapshot();
  assertEquals(plan?.epoch, epoch, "no new plan was needed");
  assertEquals([load.pagesUsed, load.running, load.waiting], [0, 0, 0]);
  assert(events.some(({ text }) => text === `epoch ${epoch} serves`), "not pushed out");
  assert(simulated.log.length < 100, `${simulated.log.length} lines of log`);
}

function textsOf(simulated: SimulatedFleet): string {
  return simulated.fleet.snapshot().events.map(({ text }) => text).join("\n");
}

/** A process that knows the subjects and says what it likes. */
function stranger(simulated: SimulatedFleet) {
  const bus = simulated.hub.connect("stranger");
  return {
    bus,
    say: (subject: string, message: unknown) => bus.publish(subject, encodeControl(message)),
  };
}

const CARD = {
  version: PROTOCOL_VERSION,
  worker: "w9",
  instance: "i9",
  host: "elsewhere",
  gpu: { name: "a GPU", software: false },
  memoryBytes: 2 ** 30,
  maxBindingBytes: 2 ** 27,
  selfTestDigest: "1".repeat(64),
  calibration: {
    denseBytesPerMs: 1,
    codegemmBytesPerMs: 1,
    wideCodeBytesPerMs: 1,
    overheadMsPerLayer: 1,
  },
  cachedParts: [],
};

Deno.test("frames that are cut, blown up, replayed, of other senders or epochs change nothing", async () => {
  const simulated = await serving(await fleetOf({ w1: {}, w2: {}, w3: {} }));
  const { bus } = stranger(simulated);
  const random = seededRandom(3);
  const pick = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)];
  const heard: { subject: string; data: Uint8Array }[] = [];
  bus.subscribe(`${PREFIX}.step.>`, ({ subject, data }) => {
    if (heard.length < 400) heard.push({ subject, data });
  });
  const { epoch } = simulated.fleet.snapshot().plan!;
  const names = ["coordinator", "w1", "w2", "w3", "nobody"];
  await undisturbed(simulated, () => {
    if (heard.length === 0) return;
    const { subject, data } = pick(heard);
    const anywhere = FLEET.step(pick(names), pick(names), pick([epoch - 1, epoch + 1, "x"]));
    const [, , to] = subject.split(".");
    switch (Math.floor(random() * 6)) {
      case 0:
        return bus.publish(subject, data.slice(0, Math.floor(random() * data.length)));
      case 1:
        return bus.publish(subject, new Uint8Array([...data, 0, 0, 0]));
      case 2:
        return bus.publish(subject, new Uint8Array(1000).map(() => Math.floor(random() * 256)));
      case 3: // A replay; results among them.
        return bus.publish(subject, data);
      case 4:
        return bus.publish(FLEET.step(to, "nobody", epoch), data);
      case 5:
        return bus.publish(anywhere, data);
    }
  });
  const { dropped, workers } = simulated.fleet.snapshot();
  for (const reason of ["malformed-frame", "wrong-sender", "duplicate", "old-epoch"]) {
    assert(dropped[reason] > 0, `${reason}: ${JSON.stringify(dropped)}`);
  }
  for (const worker of workers) {
    for (const reason of ["malformed", "wrong-sender", "old-epoch", "future-epoch", "doubled"]) {
      assert(worker.dropped[reason] > 0, `${worker.worker} ${reason}`);
    }
  }
  assertStringIncludes(textsOf(simulated), "nobody who should send results");
  assertStringIncludes(textsOf(simulated), "A frame was refused");
});

Deno.test("rubbish on the control subjects is counted, told of, and let go", async () => {
  const simulated = await serving(await fleetOf({ w1: {}, w2: {} }));
  const { bus, say } = stranger(simulated);
  const rubbish = [
    new Uint8Array(),
    new Uint8Array([0xff, 0xfe, 0]),
    new TextEncoder().encode("{"),
    new TextEncoder().encode("[".repeat(10_000)),
    encodeControl(null),
    encodeControl({ type: "ready", instance: 7, epoch: -1 }),
    new Uint8Array(300_000).fill(0x20),
  ];
  const hearing = [
    ...[FLEET.hello("w1"), FLEET.beat("w2"), FLEET.report("w1")],
    ...[FLEET.ctl("w1"), FLEET.ctl("w2"), FLEET.call],
  ];
  let at = 0;
  await undisturbed(simulated, () => {
    const data = rubbish[at++ % rubbish.length];
    bus.publish(hearing[Math.floor(at / rubbish.length) % hearing.length], data);
    say(FLEET.hello("w1"), { ...CARD, worker: "w2" });
    say(FLEET.beat("w1"), {
      worker: "w2",
      instance: "i",
      sequence: 1,
      sentAtMs: 0,
      epoch: 0,
      state: "idle",
      dropped: {},
    });
  });
  const { dropped, workers } = simulated.fleet.snapshot();
  assert(dropped["malformed-message"] > 50 && dropped["wrong-sender"] > 100, "counted");
  assertEquals(workers.map(({ worker }) => worker), ["w1", "w2"]);
  assertStringIncludes(textsOf(simulated), "A control message is malformed");
  assertStringIncludes(textsOf(simulated), "speaks in the name of w2");
});

Deno.test("reports of strangers, spares, dead processes and other epochs move nothing", async () => {
  const simulated = await serving(await fleetOf({ w1: {}, w2: {} }));
  simulated.join("spare");
  await simulated.run(500);
  const { say } = stranger(simulated);
  const { epoch, attempt } = simulated.fleet.snapshot().plan!;
  const failed = { type: "failed", code: "gpu", message: "so I say" };
  await undisturbed(simulated, () => {
    say(FLEET.report("w1"), { ...failed, instance: "w1-gone", epoch });
    say(FLEET.report("w1"), { ...failed, instance: "w1-0", epoch: epoch + 1 });
    say(FLEET.report("spare"), { ...failed, instance: "spare-2", epoch });
    say(FLEET.report("nobody"), { ...failed, instance: "i", epoch });
    const gap = { type: "gap", instance: "spare-2", epoch, attempt, expected: 1, got: 2 };
    say(FLEET.report("spare"), gap);
    const beat = { sequence: 9, sentAtMs: 0, epoch, state: "failed", dropped: {} };
    say(FLEET.beat("w1"), { ...beat, worker: "w1", instance: "w1-gone" });
  });
  const { dropped, load } = simulated.fleet.snapshot();
  assert(dropped["stray-report"] > 100 && dropped["unknown-process"] > 100, "counted");
  assertEquals(load.reissuesTotal, 0);
});

Deno.test("a stage that reports gaps without end makes steps slower, and stops none", async () => {
  const simulated = await serving(await fleetOf({ w1: {}, w2: {} }));
  const { say } = stranger(simulated);
  const startMs = simulated.clock.nowMs();
  await undisturbed(simulated, () => {
    const { epoch, attempt } = simulated.fleet.snapshot().plan!;
    const gap = { type: "gap", instance: "w2-1", epoch, attempt, expected: 1, got: 2 };
    say(FLEET.report("w2"), gap);
  });
  assert(simulated.fleet.snapshot().load.reissuesTotal > 10, "it was listened to");
  const tookMs = simulated.clock.nowMs() - startMs;
  const calm = await serving(await fleetOf({ w1: {}, w2: {} }));
  const calmStartMs = calm.clock.nowMs();
  await calm.generate(REQUESTS);
  const factor = tookMs / (calm.clock.nowMs() - calmStartMs);
  assert(factor < 8, `${factor.toFixed(1)} times as long`);
});

Deno.test("cards that lie are refused; one of another release is told what to do", async () => {
  const simulated = await serving(await fleetOf({ w1: {} }));
  const { bus, say } = stranger(simulated);
  const lies: object[] = [
    { memoryBytes: -1 },
    { memoryBytes: 1e300 },
    { gpu: null },
    { calibration: { ...CARD.calibration, denseBytesPerMs: 0 } },
    { calibration: { ...CARD.calibration, codegemmBytesPerMs: 5e-324 } },
    { calibration: { ...CARD.calibration, overheadMsPerLayer: 1e300 } },
    { worker: "coordinator" },
    { cachedParts: ["x"] },
  ];
  for (const lie of lies) say(FLEET.hello("w9"), { ...CARD, ...lie });
  const overflow = JSON.stringify(CARD).replace('"memoryBytes":1073741824', '"memoryBytes":1e999');
  bus.publish(FLEET.hello("w9"), new TextEncoder().encode(overflow));
  say(FLEET.hello("coordinator"), { ...CARD, worker: "coordinator" });
  say(FLEET.hello("w8"), { version: PROTOCOL_VERSION + 1, worker: "w8", instance: "i8", shape: 0 });
  say(FLEET.hello("w7"), { ...CARD, version: PROTOCOL_VERSION + 1, worker: "w7" });
  await simulated.run(100);
  const { workers, dropped } = simulated.fleet.snapshot();
  assertEquals(workers.map(({ worker, state }) => [worker, state]), [
    ["coordinator", "failed"],
    ["w1", "serving"],
    ["w7", "failed"],
  ]);
  assertEquals(dropped["malformed-message"] + dropped["wrong-sender"], lies.length + 1);
  const refusal = `w8 is refused: It speaks protocol version ${PROTOCOL_VERSION + 1}`;
  assertStringIncludes(textsOf(simulated), refusal);
  assertEquals(await simulated.generate(REQUESTS), expected);
});

/** A last stage that tampers with its results. */
function tampering(tamper: (result: Extract<RowResult, { type: "sample" }>) => void): Temper {
  const load = (honest: StageRunner): Promise<StageRunner> =>
    Promise.resolve({
      async run(batch, hidden) {
        const output = await honest.run(batch, hidden);
        for (const result of output.results) if (result.type === "sample") tamper(result);
        return output;
      },
    });
  return { load };
}

for (
  const [what, tamper, words] of [
    ["answers other rows than asked", { row: 77 }, "answer row 77"],
    ["draws tokens that do not exist", { token: 4_000_000_000 }, "name token 4000000000"],
    ["puts out NaN", { logprob: NaN }, "not numbers"],
  ] as const
) {
  Deno.test(`a stage that ${what} is left out, and the streams go on elsewhere`, async () => {
    // The last worker of a plan has the head.
    const evil = tampering((result) => Object.assign(result, tamper));
    const simulated = await serving(await fleetOf({ w1: {}, w2: evil }));
    const startMs = simulated.clock.nowMs();
    assertEquals(await simulated.generate(REQUESTS), expected);
    assert(simulated.clock.nowMs() - startMs < 10_000, "at once");
    const { plan, workers } = simulated.fleet.snapshot();
    assertEquals(plan!.stages.map(({ worker }) => worker), ["w1"]);
    const w2 = workers.find(({ worker }) => worker === "w2")!;
    assertEquals(w2.state, "failed");
    assertStringIncludes(w2.note, words);
    assertStringIncludes(textsOf(simulated), "w2 is left out for 30 s");
  });
}

Deno.test("a pipeline that swallows every step is given up in words, and spares get their turn", async () => {
  const swallow: Temper = { load: () => Promise.resolve({ run: () => new Promise(() => {}) }) };
  const simulated = await serving(await fleetOf({ w1: swallow, w2: {} }));
  simulated.join("w3");
  assertEquals(await simulated.generate(REQUESTS), expected);
  assertEquals(simulated.fleet.snapshot().plan!.stages.map(({ worker }) => worker), ["w3"]);

  const alone = await serving(await fleetOf({ w1: swallow }));
  const stream = alone.start({});
  await alone.until(() => stream.ended);
  assertEquals((stream.error as FleetError).code, "unavailable");
  assertStringIncludes(stream.error!.message, "brought no result in 8 attempts");
});

Deno.test("a worker that accepts and never gets ready holds the others up less and less", async () => {
  const never: Temper = { load: () => new Promise(() => {}) };
  const simulated = await fleetOf({ w1: {}, w2: never });
  await serving(simulated);
  assertEquals(simulated.fleet.snapshot().plan!.stages.map(({ worker }) => worker), ["w1"]);
  assertStringIncludes(textsOf(simulated), "w2 is left out for 30 s: it made no progress");
  let servedMs = 0;
  const spanMs = 2_400_000, startMs = simulated.clock.nowMs();
  for (let lastMs = startMs; lastMs < startMs + spanMs;) {
    await simulated.run(5_000);
    const nowMs = simulated.clock.nowMs();
    if (simulated.fleet.snapshot().state === "serving") servedMs += nowMs - lastMs;
    lastMs = nowMs;
  }
  assert(servedMs > 0.7 * spanMs, `served ${Math.round(servedMs / 60_000)} of 40 minutes`);
});

Deno.test("a damaged model: every worker says so, /fleet too, and it is tried ever less often", async () => {
  const damage = new FleetError("bad-checkpoint", "layer.3 scales: element 7 is not finite");
  const broken: Temper = { load: () => Promise.reject(damage) };
  const simulated = await fleetOf({ w1: broken, w2: broken });
  await simulated.until(() => simulated.fleet.snapshot().state === "failed");
  await simulated.run(2_000);
  const { note, workers } = simulated.fleet.snapshot();
  assertStringIncludes(note, "every worker has failed (w1: layer.3 scales: element 7");
  assertEquals(workers.map(({ state }) => state), ["failed", "failed"]);
  assertThrows(() => simulated.start({}), FleetError, "element 7 is not finite");
  for (let minute = 0; minute < 15; minute++) await simulated.run(60_000);
  const epochs = simulated.log.filter((line) => /^epoch \d+:/.test(line)).length;
  assert(epochs > 4 && epochs < 16, `${epochs} epochs in a quarter of an hour`);
});

Deno.test("a worker that refuses is left out with its reason", async () => {
  const simulated = new SimulatedFleet();
  const { bus, say } = stranger(simulated);
  let sequence = 0;
  const beat = () => {
    const idle = { sentAtMs: 0, epoch: 0, state: "idle", dropped: {} };
    say(FLEET.beat("w9"), { ...idle, worker: "w9", instance: "i9", sequence: sequence++ });
    simulated.clock.after(100, beat);
  };
  bus.subscribe(
    FLEET.ctl("w9"),
    ({ respond }) => respond?.(encodeControl({ type: "refused", reason: "not today" })),
  );
  say(FLEET.hello("w9"), CARD);
  beat();
  await simulated.until(() => simulated.fleet.snapshot().workers[0]?.state === "failed");
  assertEquals(simulated.fleet.snapshot().workers[0].note, "it refuses: not today");
  simulated.join("w1");
  await serving(simulated);
  assertEquals(await simulated.generate(REQUESTS), expected);
});

Deno.test("two processes of one name: the newer serves, and they do not take turns", async () => {
  const simulated = await serving(await fleetOf({ w1: {}, w2: {} }));
  simulated.join("w2");
  await simulated.run(3_000);
  const { epoch } = (await serving(simulated)).fleet.snapshot().plan!;
  assertEquals(simulated.fleet.snapshot().plan!.stages.length, 2);
  // An unknown worker's beats make the coordinator call the roll, which both answer.
  const { say } = stranger(simulated);
  const beat = { instance: "i", sequence: 0, sentAtMs: 0, epoch: 0, state: "idle", dropped: {} };
  await undisturbed(simulated, () => say(FLEET.beat("w9"), { ...beat, worker: "w9" }));
  await simulated.run(60_000);
  assertEquals(simulated.fleet.snapshot().plan!.epoch, epoch);
  assertStringIncludes(textsOf(simulated), "a second process calls itself w2");
  const note = simulated.fleet.snapshot().workers.find(({ worker }) => worker === "w2")!.note;
  assertStringIncludes(note, "--name");
});

Deno.test("a worker that flaps is taken in ever less often, and no stream suffers", async () => {
  const simulated = await serving(await fleetOf({ w1: {}, w2: {} }));
  const { bus } = simulated.workers.get("w2")!;
  const flap = () => {
    if (bus.status === "connected") bus.cut();
    else bus.restore();
    timer = simulated.clock.after(4_000, flap);
  };
  let timer = simulated.clock.after(4_000, flap);
  const before = simulated.fleet.snapshot().plan!.epoch;
  await simulated.run(600_000);
  const epochs = simulated.fleet.snapshot().plan!.epoch - before;
  assert(epochs >= 2 && epochs <= 14, `${epochs} plans in ten minutes of flapping`);
  assertEquals(await simulated.generate(REQUESTS), expected);
  timer.cancel();
  bus.restore();
  await simulated.until(() => simulated.fleet.snapshot().plan?.stages.length === 2);
});

Deno.test("a crowd of invented workers neither fills the memory nor the log", async () => {
  const simulated = await serving(await fleetOf({ w1: {}, w2: {} }));
  const { say } = stranger(simulated);
  let invented = 0;
  await undisturbed(simulated, () => {
    for (let i = 0; i < 5; i++) {
      const worker = `x${invented++}`;
      say(FLEET.hello(worker), { ...CARD, worker, memoryBytes: 1 });
    }
  });
  assert(invented > 1_000, `${invented}`);
  assert(simulated.fleet.snapshot().workers.length <= 256);
});

Deno.test("a fleet that is stopped while it plans asks nobody for anything any more", async () => {
  const { promise, resolve } = Promise.withResolvers<number>();
  const simulated = new SimulatedFleet({ fleet: { nextEpoch: () => promise } });
  simulated.join("w1");
  await simulated.run(2_000);
  const stopped = simulated.fleet.stop();
  resolve(1);
  await simulated.run(5_000);
  await stopped;
  assertEquals(simulated.fleet.snapshot().plan, null);
  assertEquals(simulated.workers.get("w1")!.worker.epoch, 0);
  assertThrows(() => simulated.start({}), FleetError, "shutting down");
});

Deno.test("a fleet stops in bounded time, its streams with it, though the bus be away", async () => {
  const simulated = await serving(await fleetOf({ w1: {} }));
  const stream = simulated.start({ maxTokens: 200 });
  await simulated.run(50);
  simulated.workers.get("w1")!.bus.cut();
  const startMs = simulated.clock.nowMs();
  let over = false;
  simulated.fleet.stop().then(() => over = true);
  await simulated.until(() => over && stream.ended);
  assert(simulated.clock.nowMs() - startMs <= 1_100);
  assertEquals((stream.error as FleetError).code, "unavailable");
});

Deno.test("NATS away while workers load: they go on loading, and serve that very plan", async () => {
  let ready = () => {};
  const slow: Temper = {
    load: (honest) => new Promise((resolve) => ready = () => resolve(honest)),
  };
  const coordinator = { bus: null as null | ReturnType<SimulatedFleet["hub"]["connect"]> };
  const simulated = new SimulatedFleet({ onBus: (bus) => coordinator.bus = bus });
  simulated.join("w1", slow);
  await simulated.until(() => simulated.fleet.snapshot().plan !== null);
  await simulated.run(100);
  const everybody = [coordinator.bus!, simulated.workers.get("w1")!.bus];
  for (const bus of everybody) bus.cut();
  await simulated.run(3_000);
  ready();
  await simulated.run(3_000);
  for (const bus of everybody) bus.restore();
  await serving(simulated);
  assertEquals(simulated.fleet.snapshot().plan!.epoch, 1);
});

Deno.test("a bus that loses one message in five, of any kind, and every single report", async () => {
  const simulated = new SimulatedFleet({ seed: 5, fleet: { stages: 3 } });
  simulated.hub.faults = { lose: 0.2, double: 0.1, delay: 0, maxDelayMs: 10 };
  for (const name of ["w1", "w2", "w3"]) simulated.join(name);
  await serving(simulated);
  assertEquals(await simulated.generate(REQUESTS), expected);

  const reports = (subject: string) => subject.includes(".report.");
  const silent = new SimulatedFleet({ fleet: { stages: 2 } });
  silent.hub.faults = { lose: 1, double: 0, delay: 0, maxDelayMs: 0, subject: reports };
  silent.join("w1");
  silent.join("w2", { load: () => Promise.reject(new FleetError("gpu", "no luck")) });
  const startMs = silent.clock.nowMs();
  await serving(silent);
  assert(silent.clock.nowMs() - startMs < 5_000);
  assertStringIncludes(textsOf(silent), "w2 is left out for 30 s: it says that it failed");
});

Deno.test("a worker that loads what was called off is told to let go", async () => {
  const simulated = new SimulatedFleet();
  const finish: (() => void)[] = [];
  const slow: Temper = {
    load: (honest) => new Promise((resolve) => finish.push(() => resolve(honest))),
  };
  simulated.join("w1", slow);
  await simulated.until(() => simulated.workers.get("w1")!.worker.state === "loading");
  // Before its next beat tells of the new epoch, a failed report calls the plan off.
  const { say } = stranger(simulated);
  const failed = { type: "failed", instance: "w1-0", epoch: 1, code: "gpu", message: "a lie" };
  say(FLEET.report("w1"), failed);
  simulated.join("w2");
  await serving(simulated);
  for (const go of finish) go();
  await simulated.run(1_000);
  assertEquals(simulated.fleet.snapshot().plan!.stages.map(({ worker }) => worker), ["w2"]);
  assertEquals(simulated.workers.get("w1")!.worker.state, "idle");
});
