/**
 * A transfer of 256 MiB through a real nats-server on loopback, up and down: speed and memory.
 *
 * @module
 */
import { startNatsServer } from "../tests/nats_server.ts";
import { LIMITS } from "./limits.ts";
import type { TensorSource } from "./model_config.ts";
import { connectNats } from "./nats_bus.ts";
import { type ModelManifest, partBytes, type PartManifest, sha256Hex } from "./parts.ts";
import { fetchPart, publishParts } from "./weights.ts";

const SHARDS = 8;
const BUCKET = "bench_weights";
const MIB = 1024 * 1024;

/** One tensor of eight full shards, each of its own byte. */
function syntheticModel(): { tensors: TensorSource; model: ModelManifest } {
  const bytes = SHARDS * LIMITS.maxShardBytes;
  const info = { name: "w", dtype: "U8" as const, shape: [bytes], bytes };
  const read = (_: string, offset: number, length: number) =>
    Promise.resolve(new Uint8Array(length).fill(1 + Math.floor(offset / LIMITS.maxShardBytes)));
  const manifest: PartManifest = {
    version: 1,
    part: "layer.0",
    tensors: [{ ...info, offset: 0 }],
    shards: Array.from({ length: SHARDS }, (_, i) => ({
      digest: sha256Hex(new Uint8Array(LIMITS.maxShardBytes).fill(1 + i)),
      bytes: LIMITS.maxShardBytes,
    })),
  };
  const json = new TextEncoder().encode(JSON.stringify(manifest));
  const ref = { part: manifest.part, digest: sha256Hex(json), bytes: partBytes(manifest) };
  return {
    tensors: { names: () => ["w"], has: (name) => name === "w", info: () => info, read },
    model: { digest: ref.digest, parts: [{ ref, manifest, json }], bytes },
  };
}

/** Runs `transfer` and prints its speed, the memory it took and how long it held the thread. */
async function measured(name: string, transfer: () => Promise<unknown>): Promise<void> {
  const rss = () => Deno.memoryUsage().rss;
  const before = rss();
  let peak = before, worstMs = 0, lastMs = performance.now();
  const watch = setInterval(() => {
    peak = Math.max(peak, rss());
    worstMs = Math.max(worstMs, performance.now() - lastMs - 5);
    lastMs = performance.now();
  }, 5);
  const startedMs = performance.now();
  await transfer();
  const seconds = (performance.now() - startedMs) / 1000;
  clearInterval(watch);
  const speed = SHARDS * LIMITS.maxShardBytes / MIB / seconds;
  console.log(
    `${name}: ${speed.toFixed(0)} MiB/s, ${((peak - before) / MIB).toFixed(0)} MiB of memory, ` +
      `thread held at most ${worstMs.toFixed(0)} ms`,
  );
}

if (import.meta.main) {
  await using server = await startNatsServer();
  const { bus, connection } = await connectNats({ url: server.url, name: "bench" });
  const { tensors, model } = syntheticModel();
  await measured("upload", () => publishParts({ connection, bucket: BUCKET, tensors, model }));
  const store = {
    manifest: () => Promise.resolve(null),
    putManifest: () => Promise.resolve(),
    hasShard: () => Promise.resolve(false),
    putShard: () => Promise.resolve(),
  };
  const [{ ref }] = model.parts;
  await measured(
    "download",
    () => fetchPart({ connection, bucket: BUCKET, part: ref, store }),
  );
  await bus.close();
}
