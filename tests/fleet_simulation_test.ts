import { assert, assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { seededRandom } from "../shared/random.ts";
import type { GenerateRequest } from "../coordinator/engine.ts";
import { SimulatedFleet, type SimulationOptions } from "./simulated_fleet.ts";

/** Twelve requests: long and short prompts, greedy and sampled. */
function mixedRequests(): Partial<GenerateRequest>[] {
  const random = seededRandom(11);
  return Array.from({ length: 12 }, (_, i) => ({
    promptTokens: Uint32Array.from(
      { length: 1 + Math.floor(random() * 150) },
      () => Math.floor(random() * 1000),
    ),
    maxTokens: 1 + Math.floor(random() * 40),
    temperature: i % 2,
    seed: BigInt(i),
    choice: i % 3,
  }));
}

async function fleetOf(workers: number, options: SimulationOptions = {}): Promise<SimulatedFleet> {
  const simulated = new SimulatedFleet({
    ...options,
    fleet: { stages: workers, ...options.fleet },
  });
  for (let i = 1; i <= workers; i++) simulated.join(`w${i}`);
  await simulated.until(() => simulated.fleet.snapshot().state === "serving");
  return simulated;
}

/** What one stage, one request at a time, on a perfect bus yields. */
async function expectedTokens(): Promise<(number[] | Error)[]> {
  const alone = await fleetOf(1);
  const all = [];
  for (const request of mixedRequests()) all.push(...await alone.generate([request]));
  return all;
}

Deno.test("streams are the same alone or together, on 1 to 4 stages", async () => {
  const expected = await expectedTokens();
  assertEquals(
    expected.map((tokens) => (tokens as number[]).length),
    mixedRequests().map((r) => r.maxTokens!),
  );
  for (const workers of [1, 2, 3, 4]) {
    const simulated = await fleetOf(workers);
    assertEquals(simulated.fleet.snapshot().plan?.stages.length, workers);
    assertEquals(await simulated.generate(mixedRequests()), expected, `${workers} stages`);
  }
});

Deno.test("a bus that loses, doubles and delays frames changes no stream", async () => {
  const expected = await expectedTokens();
  for (let seed = 1; seed <= 5; seed++) {
    const simulated = await fleetOf(3, { seed });
    simulated.hub.faults = {
      lose: 0.03,
      double: 0.05,
      delay: 0.05,
      maxDelayMs: 40,
      subject: (subject) => subject.includes(".step."),
    };
    assertEquals(await simulated.generate(mixedRequests()), expected, `seed ${seed}`);
    assert(simulated.hub.counts.lost > 0 && simulated.hub.counts.doubled > 0, "faults struck");
    assert(simulated.fleet.snapshot().load.reissuesTotal > 0, "lost steps were sent again");
  }
});

Deno.test("streams go on with the same tokens when a worker dies, whichever and whenever", async () => {
  const expected = await expectedTokens();
  for (const [victim, afterMs] of [["w1", 35], ["w2", 120], ["w3", 300]] as const) {
    const simulated = await fleetOf(3);
    const streams = mixedRequests().map((request) => simulated.start(request));
    await simulated.run(afterMs);
    simulated.kill(victim);
    await simulated.until(() => streams.every((stream) => stream.ended));
    assertEquals(streams.map(({ tokens }) => tokens), expected as number[][], victim);
    const { plan } = simulated.fleet.snapshot();
    assertEquals(plan?.stages.map(({ worker }) => worker).includes(victim), false);
    assertEquals(plan?.stages.length, 2);
  }
});

Deno.test("a worker that was declared dead and wakes up affects nothing, and gets a stage again", async () => {
  const expected = await expectedTokens();
  const simulated = await fleetOf(2);
  const streams = mixedRequests().map((request) => simulated.start(request));
  await simulated.run(60);
  const { bus } = simulated.workers.get("w2")!;
  bus.cut();
  await simulated.until(() => simulated.fleet.snapshot().plan?.epoch === 2);
  bus.restore();
  await simulated.until(() => streams.every((stream) => stream.ended));
  assertEquals(streams.map(({ tokens }) => tokens), expected as number[][]);
  await simulated.until(() => simulated.fleet.snapshot().plan?.stages.length === 2);
});

Deno.test("a worker that is restarted under its name replaces its old process", async () => {
  const simulated = await fleetOf(2);
  const before = simulated.fleet.snapshot().plan!.epoch;
  simulated.kill("w1");
  simulated.join("w1");
  await simulated.until(() => {
    const { plan, state } = simulated.fleet.snapshot();
    return state === "serving" && plan!.epoch > before && plan!.stages.length === 2;
  });
  assertEquals((await simulated.generate([{}]))[0], (await (await fleetOf(1)).generate([{}]))[0]);
});

Deno.test("requests wait while the fleet has no pipeline, and fail in words when none comes back", async () => {
  const simulated = await fleetOf(1);
  const stream = simulated.start({ maxTokens: 200 });
  await simulated.run(100);
  simulated.kill("w1");
  await simulated.until(() => simulated.fleet.snapshot().state === "waiting");
  await simulated.run(10_000);
  assertEquals(stream.ended, false);
  await simulated.until(() => stream.ended);
  assertEquals((stream.error as FleetError).code, "unavailable");
  assertStringIncludes(stream.error!.message, "no worker is there");
  assertThrows(() => simulated.start({}), FleetError, "serves nothing");
});

Deno.test("a client that goes away frees its pages, and the others go on", async () => {
  const simulated = await fleetOf(2);
  const gone = simulated.start({ maxTokens: 200 });
  const stays = simulated.start({ maxTokens: 30 });
  await simulated.until(() => gone.tokens.length > 3);
  gone.abort.abort();
  await simulated.until(() => stays.ended);
  assertEquals(stays.tokens.length, 30);
  assertEquals(gone.ended, true);
  await simulated.run(200);
  const { pagesUsed, running, waiting } = simulated.fleet.snapshot().load;
  assertEquals([pagesUsed, running, waiting], [0, 0, 0]);
});

Deno.test("a model that does not fit waits, says how much is missing, and is served once it fits", async () => {
  const simulated = new SimulatedFleet();
  simulated.join("small", { memoryBytes: 50_000 });
  await simulated.run(3_000);
  const { state, note } = simulated.fleet.snapshot();
  assertEquals(state, "waiting");
  assertStringIncludes(note, "Cannot place the model");
  simulated.join("large");
  await simulated.until(() => simulated.fleet.snapshot().state === "serving");
});

Deno.test("readiness is a fresh step or a canary's way through all stages", async () => {
  const simulated = new SimulatedFleet({ fleet: { stages: 2 } });
  simulated.join("w1");
  await simulated.run(2_000);
  assertEquals(await simulated.fleet.readiness(), {
    ready: false,
    reason: "1 of 2 workers have joined",
  });
  simulated.join("w2");
  await simulated.until(() => simulated.fleet.snapshot().state === "serving");
  let ready: boolean | null = null;
  simulated.fleet.readiness().then((readiness) => ready = readiness.ready);
  await simulated.until(() => ready !== null);
  assertEquals(ready, true);
  // Frozen: connected, but nothing comes through.
  for (const { bus } of simulated.workers.values()) bus.cut();
  await simulated.run(400);
  ready = null;
  simulated.clock.advance(0);
  simulated.fleet.readiness().then((readiness) => ready = readiness.ready);
  await simulated.until(() => ready !== null);
  assertEquals(ready, true); // a step completed 5 s ago at most
  await simulated.run(6_000);
  ready = null;
  simulated.fleet.readiness().then((readiness) => ready = readiness.ready);
  await simulated.until(() => ready !== null);
  assertEquals(ready, false);
});
