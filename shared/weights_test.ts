import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertRejects,
  assertThrows,
} from "@std/assert";
import type { NatsConnection } from "nats.ws";
import { startNatsServer } from "../tests/nats_server.ts";
import { FleetError } from "./errors.ts";
import { connectNats, type NatsLink } from "./nats_bus.ts";
import { formatRanges, ObjectStore, parseRanges } from "./object_store.ts";
import { describeParts, type ModelManifest, PartTensorSource } from "./parts.ts";
import { tinyCheckpoint } from "./parts_fixture.ts";
import { randomInt, seededRandom } from "./random.ts";
import { fetchPart, type PartStore, publishParts, type TransferProgress } from "./weights.ts";

const BUCKET = "test_weights";

/** A worker's cache in memory that counts what it is given. */
class MemoryStore implements PartStore {
  readonly objects = new Map<string, Uint8Array>();
  shardsPut = 0;
  manifest(digest: string): Promise<Uint8Array | null> {
    return Promise.resolve(this.objects.get(digest) ?? null);
  }
  putManifest(digest: string, manifest: Uint8Array): Promise<void> {
    this.objects.set(digest, manifest);
    return Promise.resolve();
  }
  hasShard({ digest }: { digest: string }): Promise<boolean> {
    return Promise.resolve(this.objects.has(digest));
  }
  putShard(digest: string, bytes: Uint8Array): Promise<void> {
    this.shardsPut++;
    this.objects.set(digest, bytes);
    return Promise.resolve();
  }
}

async function tinyModel(seed = 1) {
  const checkpoint = await tinyCheckpoint({ seed });
  const model = await describeParts(checkpoint, { shardBytes: 500 });
  const shards = new Set(
    model.parts.flatMap(({ manifest }) => manifest.shards.map((s) => s.digest)),
  );
  return { checkpoint, model, shards: shards.size };
}

async function fetchAll(connection: NatsConnection, model: ModelManifest, store: PartStore) {
  for (const { ref } of model.parts) {
    await fetchPart({ connection, bucket: BUCKET, part: ref, store, requestTimeoutMs: 500 });
  }
}

Deno.test("weights over a real server", async (t) => {
  await using server = await startNatsServer();
  const link: NatsLink = await connectNats({ url: server.url, name: "coordinator" });
  const { connection } = link;
  const { checkpoint, model, shards } = await tinyModel();
  const publish = (more: { onProgress?: (progress: TransferProgress) => void } = {}) =>
    publishParts({
      connection,
      bucket: BUCKET,
      tensors: checkpoint,
      model,
      requestTimeoutMs: 500,
      ...more,
    });

  await t.step("fetching what was never published says so", async () => {
    await new ObjectStore({ connection, bucket: BUCKET }).ensure();
    const error = await assertRejects(
      () => fetchAll(connection, model, new MemoryStore()),
      FleetError,
    );
    assertEquals(error.code, "not-found");
  });

  await t.step("an upload survives a restart of the server in its middle", async () => {
    let restarted: Promise<void> | undefined;
    const published = await publish({
      onProgress: ({ doneBytes, totalBytes }) => {
        if (doneBytes > totalBytes / 3) restarted ??= server.restart();
      },
    });
    assert(restarted);
    await restarted;
    assertEquals(published.uploadedObjects, shards + model.parts.length);
    assertEquals(published.uploadedBytes, published.totalBytes);
  });

  await t.step("publishing again uploads nothing", async () => {
    const seen: TransferProgress[] = [];
    const again = await publish({ onProgress: (progress) => seen.push(progress) });
    assertEquals([again.uploadedObjects, again.uploadedBytes], [0, 0]);
    assertEquals(seen, [{ doneBytes: again.totalBytes, totalBytes: again.totalBytes }]);
  });

  await t.step("what is fetched are the checkpoint's tensors, bit for bit", async () => {
    const store = new MemoryStore();
    await fetchAll(connection, model, store);
    assertEquals(store.shardsPut, shards);
    const tensors = new PartTensorSource(
      model.parts.map(({ manifest }) => manifest),
      (digest, offset, length) =>
        Promise.resolve(store.objects.get(digest)!.slice(offset, offset + length)),
    );
    for (const name of checkpoint.names()) {
      const { bytes } = checkpoint.info(name);
      assertEquals(await tensors.read(name, 0, bytes), await checkpoint.read(name, 0, bytes));
    }
    await fetchAll(connection, model, store);
    assertEquals(store.shardsPut, shards);
  });

  await t.step("a download that stopped half way goes on from there", async () => {
    const store = new MemoryStore();
    const put = store.putShard.bind(store);
    store.putShard = (digest, bytes) => {
      if (store.shardsPut >= 3) throw new FleetError("disk", "The disk is full");
      return put(digest, bytes);
    };
    const { ref, manifest } = model.parts[0];
    const fetch = (onProgress?: (progress: TransferProgress) => void) =>
      fetchPart({ connection, bucket: BUCKET, part: ref, store, onProgress });
    await assertRejects(() => fetch(), FleetError, "disk is full");
    assertEquals(store.shardsPut, 3);
    store.putShard = put;
    const seen: TransferProgress[] = [];
    await fetch((progress) => seen.push(progress));
    assertEquals(store.shardsPut, manifest.shards.length);
    assertEquals(seen[0], { doneBytes: 1500, totalBytes: ref.bytes });
    assertEquals(seen.at(-1), { doneBytes: ref.bytes, totalBytes: ref.bytes });
  });

  await t.step("a download survives a restart of the server in its middle", async () => {
    const store = new MemoryStore();
    let restarted: Promise<void> | undefined;
    const put = store.putShard.bind(store);
    store.putShard = (digest, bytes) => {
      if (store.shardsPut === 3) restarted ??= server.restart();
      return put(digest, bytes);
    };
    await fetchAll(connection, model, store);
    assert(restarted);
    await restarted;
    assertEquals(store.shardsPut, shards);
  });

  await t.step("NATS' own client reads the objects", async () => {
    const objects = await connection.jetstream().views.os(BUCKET);
    const { ref, json } = model.parts[0];
    assertEquals(await objects.getBlob(ref.digest), json);
  });

  await t.step("an object of many chunks, put by either client, reads back whole", async () => {
    const random = seededRandom(4);
    const bytes = Uint8Array.from({ length: 5_000_001 }, () => randomInt(random, 256));
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex();
    const store = new ObjectStore({ connection, bucket: BUCKET });
    await store.reserve(2, 2 * bytes.length);
    await store.write("ours", [bytes.subarray(0, 3_000_000), bytes.subarray(3_000_000)], digest);
    const objects = await connection.jetstream().views.os(BUCKET);
    assertEquals(await objects.getBlob("ours"), bytes);
    await objects.putBlob({ name: "theirs" }, bytes);
    for (const name of ["ours", "theirs"]) {
      const chunks: Uint8Array[] = [];
      for await (const chunk of store.read((await store.info(name))!)) chunks.push(chunk);
      const read = new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer());
      assertEquals(read, bytes);
      await store.remove(name);
      assertEquals(await store.info(name), null);
    }
  });

  await t.step("a corrupt object is refused, and never put into the cache", async () => {
    const objects = await connection.jetstream().views.os(BUCKET);
    const { ref, manifest } = model.parts[1];
    const [{ digest, bytes }] = manifest.shards;
    await objects.putBlob({ name: digest }, new Uint8Array(bytes));
    const store = new MemoryStore();
    const fetch = () => fetchPart({ connection, bucket: BUCKET, part: ref, store });
    const error = await assertRejects(fetch, FleetError, "another digest");
    assertEquals(error.code, "bad-checkpoint");
    assert(!store.objects.has(digest));
    await objects.putBlob({ name: digest }, new Uint8Array(bytes + 1));
    await assertRejects(fetch, FleetError, "corrupt");
    assertEquals((await publish()).uploadedObjects, 1);
    await fetch();
  });

  await t.step(
    "what an interrupted upload left is removed, and half an object sent again",
    async () => {
      const jsm = await connection.jetstreamManager();
      connection.publish(`$O.${BUCKET}.C.orphan`, new Uint8Array(10));
      const { digest } = model.parts[2].manifest.shards[0];
      const store = new ObjectStore({ connection, bucket: BUCKET });
      const { nuid } = (await store.info(digest))!;
      await jsm.streams.purge(`OBJ_${BUCKET}`, { filter: `$O.${BUCKET}.C.${nuid}` });
      await assertRejects(
        () => fetchAll(connection, model, new MemoryStore()),
        FleetError,
        "missing in the store",
      );
      assertEquals((await publish()).uploadedObjects, 1);
      const info = await jsm.streams.info(`OBJ_${BUCKET}`, { subjects_filter: "$O.*.C.*" });
      assertEquals(Object.keys(info.state.subjects!).filter((s) => s.includes("orphan")), []);
      await fetchAll(connection, model, new MemoryStore());
    },
  );

  await t.step("a checkpoint that changes while it is published is noticed", async () => {
    const other = await tinyModel(2);
    const error = await assertRejects(
      () => publishParts({ connection, bucket: "other", tensors: checkpoint, model: other.model }),
      FleetError,
    );
    assertEquals(error.code, "bad-checkpoint");
  });

  await link.bus.close();
});

Deno.test("room in the store is checked before the upload begins", async () => {
  const one = await tinyModel(1), two = await tinyModel(2);
  const publishTo = ({ connection }: NatsLink, { checkpoint, model }: typeof one) =>
    publishParts({ connection, bucket: BUCKET, tensors: checkpoint, model });
  let room: number;
  {
    await using roomy = await startNatsServer();
    const link = await connectNats({ url: roomy.url, name: "coordinator" });
    await publishTo(link, one);
    const jsm = await link.connection.jetstreamManager();
    const { config, state } = await jsm.streams.info(`OBJ_${BUCKET}`);
    await link.bus.close();
    room = config.max_bytes + state.bytes / 2;
  }
  await using server = await startNatsServer({ maxStoreBytes: room });
  const { bus, connection } = await connectNats({ url: server.url, name: "coordinator" });
  const publish = (model: typeof one) => publishTo({ bus, connection, user: null }, model);
  await publish(one);
  // There is room for one model only: the second replaces it.
  await publish(two);
  await fetchAll(connection, two.model, new MemoryStore());
  const gone = () => fetchAll(connection, one.model, new MemoryStore());
  assertEquals((await assertRejects(gone, FleetError)).code, "not-found");
  await bus.close();

  await using small = await startNatsServer({ maxStoreBytes: 10_000 });
  const link = await connectNats({ url: small.url, name: "coordinator" });
  let reported = 0;
  const error = await assertRejects(
    () =>
      publishParts({
        connection: link.connection,
        bucket: BUCKET,
        tensors: one.checkpoint,
        model: one.model,
        onProgress: () => reported++,
      }),
    FleetError,
    "GiB are to be uploaded",
  );
  assertEquals([error.code, reported], ["disk", 0]);
  await link.bus.close();
});

Deno.test("ranges of sequence numbers are short, and lying ones are refused", () => {
  assertEquals(formatRanges([1, 2, 3, 7, 9, 10]), "1-3,7,9-10");
  assertEquals(parseRanges("1-3,7,9-10", 6), [1, 2, 3, 7, 9, 10]);
  for (const [text, count] of [["", 0], ["1-3", 2], ["1-3", 4], ["x", 1], ["3-1", 3]] as const) {
    assertEquals(parseRanges(text, count), null);
  }
  assertEquals(parseRanges("1-9007199254740991", 3), null);
  const many = Array.from({ length: 64 }, (_, i) => 100 + i);
  assertLess(formatRanges(many).length, 10);
  assertGreater(parseRanges(formatRanges(many), 64)!.length, 63);
  assertThrows(() => formatRanges(null as never));
});
