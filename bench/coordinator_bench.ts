/**
 * What the coordinator itself costs: CPU milliseconds of its process per token, with 8 clients that
 * stream from the real API over HTTP, the real NATS, and a worker whose model takes no time. Worker
 * and clients run in processes of their own, so their work is not counted.
 *
 * @module
 */
import process from "node:process";
import { createApi } from "../coordinator/api/mod.ts";
import { Fleet } from "../coordinator/fleet.ts";
import { Metrics } from "../coordinator/metrics.ts";
import { systemClock } from "../shared/clock.ts";
import { connectNats } from "../shared/nats_bus.ts";
import { COORDINATOR } from "../shared/protocol.ts";
import { createTokenizer } from "../shared/tokenizer.ts";
import { startNatsServer } from "../tests/nats_server.ts";
import { simulatedModel, simulatedWorker } from "../tests/simulated_fleet.ts";

const PREFIX = "test";
const CLIENTS = 8;
const TOKENS = 200;
const ROUNDS = 5;
const DEMO = new URL("../models/story-16m-m1v4g128/", import.meta.url);

/** The worker's process. */
async function serve(url: string): Promise<void> {
  const { bus } = await connectNats({ url, name: "w1" });
  simulatedWorker({
    bus,
    clock: systemClock,
    prefix: PREFIX,
    name: "w1",
    instance: "bench",
    stepMs: 0,
  }).join();
  await new Promise(() => {});
}

/** The clients' process: each streams one answer. */
async function ask(url: string): Promise<void> {
  const stream = async (client: number) => {
    const response = await fetch(`${url}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        model: "simulated",
        prompt: [1, 2, 3 + client],
        max_tokens: TOKENS,
        stream: true,
        temperature: 1,
        seed: client,
      }),
    });
    const text = await response.text();
    if (!text.includes("[DONE]")) throw new Error(`the stream broke: ${text.slice(-300)}`);
  };
  await Promise.all(Array.from({ length: CLIENTS }, (_, client) => stream(client)));
}

function child(role: string, url: string): Deno.ChildProcess {
  return new Deno.Command(Deno.execPath(), {
    args: ["run", "--allow-all", "--quiet", import.meta.url, role, url],
  }).spawn();
}

async function main(): Promise<void> {
  await using nats = await startNatsServer({ prefix: PREFIX });
  const { bus } = await connectNats({ url: nats.url, name: COORDINATOR });
  let epoch = 0;
  const fleet = new Fleet({
    bus,
    clock: systemClock,
    prefix: PREFIX,
    model: simulatedModel(),
    nextEpoch: () => Promise.resolve(++epoch),
    contextTokens: 512,
    sequences: 16,
    objective: "throughput",
    stages: 1,
    profile: { version: 1, decode: "codegemm" },
    log: () => {},
  });
  const api = createApi({
    engine: fleet,
    tokenizer: createTokenizer(await Deno.readTextFile(new URL("tokenizer.json", DEMO))),
    chatTemplate: null,
    clock: systemClock,
    randomSeed: () => 0n,
    apiKeys: [],
    metrics: new Metrics(),
    log: (_, text) => console.error(text),
  });
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, api.fetch);
  fleet.start();
  const worker = child("serve", nats.url);
  const { promise: serving, resolve } = Promise.withResolvers<void>();
  const stopWaiting = fleet.onChange(() => fleet.snapshot().state === "serving" && resolve());
  await serving;
  stopWaiting();
  console.log(`${CLIENTS} streams of ${TOKENS} tokens, ${ROUNDS} rounds`);
  console.log("round   CPU ms/token   tokens/s");
  for (let round = 0; round <= ROUNDS; round++) {
    const before = fleet.snapshot().load.tokensTotal;
    const cpu = process.cpuUsage(), startMs = performance.now();
    const { success } = await child("ask", `http://127.0.0.1:${server.addr.port}`).status;
    if (!success) throw new Error("a client failed");
    const { user, system } = process.cpuUsage(cpu);
    const tokens = fleet.snapshot().load.tokensTotal - before;
    const perToken = (user + system) / 1000 / tokens;
    const rate = tokens / (performance.now() - startMs) * 1000;
    const label = round === 0 ? "warm-up" : String(round).padStart(5);
    console.log(`${label}   ${perToken.toFixed(3).padStart(10)}   ${rate.toFixed(0).padStart(8)}`);
  }
  worker.kill();
  await worker.status;
  await fleet.stop();
  await server.shutdown();
  await bus.close();
}

if (import.meta.main) {
  const [role, url] = Deno.args;
  if (role === "serve") await serve(url);
  else if (role === "ask") await ask(url);
  else await main();
}
