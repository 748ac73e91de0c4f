/**
 * The wire, as a frame sees it: round trips between two processes over a real nats-server on
 * loopback. One way is half of it. 16 KB is one row of activations of a 70B model.
 *
 * @module
 */
import { startNatsServer } from "../tests/nats_server.ts";
import { connectNats } from "./nats_bus.ts";

const ROUNDS = 1000;

/** The other process: sends everything back, until it is killed. */
async function echo(url: string): Promise<void> {
  const { bus } = await connectNats({ url, name: "echo" });
  bus.subscribe("bench.there", ({ data }) => bus.publish("bench.back", data));
  await bus.flush();
  console.log("ready");
}

/** Round trip times of `bytes`, ms, sorted. */
async function roundTrips(url: string, bytes: number): Promise<number[]> {
  const { bus } = await connectNats({ url, name: "bench" });
  let returned: () => void = () => {};
  bus.subscribe("bench.back", () => returned());
  await bus.flush();
  const message = new Uint8Array(bytes);
  const times: number[] = [];
  for (let i = 0; i < ROUNDS + 100; i++) {
    const startedAt = performance.now();
    await new Promise<void>((resolve) => {
      returned = resolve;
      bus.publish("bench.there", message);
    });
    if (i >= 100) times.push(performance.now() - startedAt);
  }
  await bus.close();
  return times.sort((a, b) => a - b);
}

async function main(): Promise<void> {
  await using server = await startNatsServer();
  const other = new Deno.Command(Deno.execPath(), {
    args: ["run", "-q", "--allow-all", import.meta.url, server.url],
    stdout: "piped",
  }).spawn();
  await other.stdout.getReader().read();
  console.log("bytes      one way p50   p95   p99 (ms; half a round trip)");
  for (const bytes of [64, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576]) {
    const times = await roundTrips(server.url, bytes);
    const at = (q: number) => (times[Math.floor(q * times.length)] / 2).toFixed(3).padStart(6);
    console.log(`${String(bytes).padEnd(10)} ${at(0.5)}       ${at(0.95)} ${at(0.99)}`);
  }
  other.kill();
  await other.status;
}

if (import.meta.main) await (Deno.args.length > 0 ? echo(Deno.args[0]) : main());
