import { assert, assertEquals, assertNotEquals, assertRejects, assertThrows } from "@std/assert";
import type { Checkpoint } from "./checkpoint/mod.ts";
import { FleetError } from "./errors.ts";
import {
  describePart,
  describeParts,
  parsePartManifest,
  partBytes,
  type PartManifest,
  PartTensorSource,
  readPart,
  sha256Hex,
} from "./parts.ts";
import { tinyCheckpoint } from "./parts_fixture.ts";
import { randomInt, seededRandom } from "./random.ts";

const SHARD_BYTES = 1000;

async function bytesOf(checkpoint: Checkpoint, manifest: PartManifest, at: number, length: number) {
  const slices: Uint8Array[] = [];
  for await (const slice of readPart(checkpoint, manifest, at, length)) slices.push(slice);
  return new Uint8Array(await new Blob(slices as BlobPart[]).arrayBuffer());
}

Deno.test("tensors read from shards are the checkpoint's, across shard bounds too", async () => {
  const checkpoint = await tinyCheckpoint();
  const model = await describeParts(checkpoint, { shardBytes: SHARD_BYTES });
  const shards = new Map<string, Uint8Array<ArrayBuffer>>();
  for (const { manifest } of model.parts) {
    for (const [i, { digest, bytes }] of manifest.shards.entries()) {
      const shard = await bytesOf(checkpoint, manifest, i * SHARD_BYTES, bytes);
      assertEquals(sha256Hex(shard), digest);
      shards.set(digest, shard);
    }
  }
  const parts = new PartTensorSource(
    model.parts.map(({ json }) => parsePartManifest(json)),
    (digest, offset, length) => Promise.resolve(shards.get(digest)!.slice(offset, offset + length)),
  );
  assertEquals(parts.names().sort(), checkpoint.names().sort());
  const random = seededRandom(2);
  for (const name of checkpoint.names()) {
    assert(parts.has(name));
    assertEquals(parts.info(name), checkpoint.info(name));
    const { bytes } = checkpoint.info(name);
    assertEquals(await parts.read(name, 0, bytes), await checkpoint.read(name, 0, bytes));
    const offset = randomInt(random, bytes), length = randomInt(random, bytes - offset);
    assertEquals(
      await parts.read(name, offset, length),
      await checkpoint.read(name, offset, length),
    );
    await assertRejects(() => parts.read(name, 1, bytes), FleetError, "were asked for");
  }
  assertThrows(() => parts.info("nothing"), FleetError, "no tensor nothing");
});

Deno.test("any range of a part reads as the same bytes", async () => {
  const checkpoint = await tinyCheckpoint();
  const { manifest } = await describePart(checkpoint, "layer.0", { shardBytes: SHARD_BYTES });
  const total = partBytes(manifest);
  const whole = await bytesOf(checkpoint, manifest, 0, total);
  assertEquals(whole.length, total);
  const random = seededRandom(3);
  for (let i = 0; i < 50; i++) {
    const at = randomInt(random, total), length = randomInt(random, total - at + 1);
    assertEquals(await bytesOf(checkpoint, manifest, at, length), whole.slice(at, at + length));
  }
});

Deno.test("digests name contents: equal for equal models, other when a weight is", async () => {
  const one = await describeParts(await tinyCheckpoint());
  assertEquals((await describeParts(await tinyCheckpoint())).digest, one.digest);
  const other = await describeParts(await tinyCheckpoint({ seed: 2 }));
  assertNotEquals(other.digest, one.digest);
  assertEquals(one.parts.map(({ ref }) => ref.part), ["embedding", "layer.0", "layer.1", "head"]);
  for (const { ref, json, manifest } of one.parts) {
    assertEquals([ref.digest, ref.bytes], [sha256Hex(json), partBytes(manifest)]);
  }
  assertEquals(one.bytes, one.parts.reduce((sum, { ref }) => sum + ref.bytes, 0));
});

Deno.test("a manifest's digest stays what it is, so that caches stay valid", async () => {
  const { ref } = await describePart(await tinyCheckpoint(), "layer.1", { shardBytes: 1000 });
  assertEquals(
    ref.digest,
    "26ec64e27175f55abb197aa89f55181e770b1f67b826806bac8f3fff40c74d23",
  );
});

Deno.test("a tied output head shares the embedding's full shards", async () => {
  const model = await describeParts(await tinyCheckpoint({ tied: true }), { shardBytes: 1000 });
  const [embedding, head] = [model.parts[0], model.parts[3]].map(({ manifest }) => manifest.shards);
  assertEquals(head.slice(0, 2), embedding.slice(0, 2));
});

Deno.test("progress counts up to the size of the model", async () => {
  const seen: number[] = [];
  const model = await describeParts(await tinyCheckpoint(), { onProgress: (n) => seen.push(n) });
  assertEquals(seen, [...seen].sort((a, b) => a - b));
  assertEquals(seen.at(-1), model.bytes);
});

Deno.test("parsePartManifest() refuses what contradicts itself", async () => {
  const { manifest } = await describePart(await tinyCheckpoint(), "layer.0", { shardBytes: 1000 });
  const encode = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));
  assertEquals(parsePartManifest(encode(manifest)), manifest);
  const refusals: [reason: string, change: (m: PartManifest) => void][] = [
    ["malformed", (m) => m.version = 2 as 1],
    ["malformed", (m) => m.part = "layer.x"],
    ["malformed", (m) => m.shards[0].digest = "x"],
    ["malformed", (m) => m.shards[0].bytes = 2 ** 30],
    ["malformed", (m) => m.tensors[0].offset = -1],
    ["malformed", (m) => m.tensors[0].dtype = "F64" as "F32"],
    ["not the bytes of its shape", (m) => m.tensors[0].shape[0]++],
    ["not where it should be", (m) => m.tensors[1].offset += 16],
    ["listed twice", (m) => m.tensors[1].name = m.tensors[0].name],
    ["not as long", (m) => m.shards.pop()],
    ["differ in size", (m) => {
      m.shards[0].bytes += 8;
      m.shards[1].bytes -= 8;
    }],
  ];
  for (const [reason, change] of refusals) {
    const broken = structuredClone(manifest);
    change(broken);
    const error = assertThrows(() => parsePartManifest(encode(broken)), FleetError, reason);
    assertEquals(error.code, "bad-checkpoint");
  }
  assertThrows(() => parsePartManifest(Uint8Array.of(255, 1)), FleetError, "malformed");
});
