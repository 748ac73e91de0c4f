/**
 * Weights over NATS: the coordinator publishes the parts of its model, workers fetch those of their
 * stage. Every object is named by the SHA-256 of its bytes, so what is there is never sent again and
 * what arrives is checked. Progress is kept per shard, two are under way at a time, and a lost
 * connection costs at most those two.
 *
 * @module
 */
import type { NatsConnection } from "nats.ws";
import { createHash } from "node:crypto";
import { type Clock, sleep, systemClock } from "./clock.ts";
import { FleetError } from "./errors.ts";
import { LIMITS } from "./limits.ts";
import type { TensorSource } from "./model_config.ts";
import { ObjectStore } from "./object_store.ts";
import {
  type ModelManifest,
  parsePartManifest,
  partBytes,
  type PartManifest,
  readPart,
  type ShardRef,
} from "./parts.ts";
import type { PartRef } from "./protocol.ts";

/** Where weights lie, and how patiently to reach for them. */
export interface WeightsOptions {
  connection: NatsConnection;
  /** `subjects(prefix).bucket` */
  bucket: string;
  clock?: Clock;
  /** See {@linkcode ObjectStore}. */
  requestTimeoutMs?: number;
  signal?: AbortSignal;
}

/** A shard is tried this often, with pauses of a quarter second that double up to four. */
const TRIES = 10;
const FIRST_PAUSE_MS = 250;
const MAX_PAUSE_MS = 4_000;
/** Bytes of another digest than their name's may be the wire's fault, once. */
const TRIES_OF_CORRUPT = 2;

/** Bytes of a transfer: `doneBytes` includes what was there before. */
export interface TransferProgress {
  doneBytes: number;
  totalBytes: number;
}

/** What came of publishing. */
export interface Published {
  /** Shards and manifests sent. */
  uploadedObjects: number;
  uploadedBytes: number;
  totalBytes: number;
}

/**
 * Puts the parts of a model into the store, as far as they are not there. Room is reserved before the
 * first byte is sent; when there is not enough, other models' parts are removed.
 *
 * @param tensors the checkpoint that `model` describes
 * @throws FleetError `disk` when the store has no room, and how much is needed; `nats` when it stays
 * out of reach; `bad-checkpoint` when the checkpoint changes meanwhile
 */
export async function publishParts(
  options: WeightsOptions & {
    tensors: TensorSource;
    model: ModelManifest;
    onProgress?: (progress: TransferProgress) => void;
  },
): Promise<Published> {
  const { model, tensors } = options;
  const store = new ObjectStore(options);
  await store.ensure();
  const wanted = wantedObjects(model, tensors);
  let present = await store.tidy();
  const absent = () => [...wanted].filter(([name, { bytes }]) => present.get(name) !== bytes);
  let missing = absent();
  const sum = (objects: typeof missing) =>
    objects.reduce((total, [, object]) => total + object.bytes, 0);
  const totalBytes = sum([...wanted]), uploadedBytes = sum(missing);
  if (missing.length > 0) {
    try {
      await store.reserve(missing.length, uploadedBytes);
    } catch (error) {
      if (!(error instanceof FleetError && error.code === "disk")) throw error;
      for (const name of present.keys()) if (!wanted.has(name)) await store.remove(name);
      present = await store.tidy();
      missing = absent();
      await reserveOrExplain(store, missing.length, uploadedBytes);
    }
  }
  let doneBytes = totalBytes - uploadedBytes;
  const report = () => options.onProgress?.({ doneBytes, totalBytes });
  report();
  // Manifests follow all shards, so a part that can be found can be fetched.
  for (const kind of ["shard", "manifest"]) {
    const objects = missing.filter(([, object]) => object.kind === kind);
    await inParallel(objects, LIMITS.maxShardsInFlight, async ([name, object]) => {
      await retrying(options, () => store.write(name, object.slices(), name));
      doneBytes += object.bytes;
      report();
    });
  }
  return { uploadedObjects: missing.length, uploadedBytes, totalBytes };
}

async function reserveOrExplain(store: ObjectStore, objects: number, bytes: number): Promise<void> {
  try {
    await store.reserve(objects, bytes);
  } catch (error) {
    if (!(error instanceof FleetError && error.code === "disk")) throw error;
    const gib = (bytes / 2 ** 30).toFixed(2);
    throw new FleetError(
      "disk",
      `${error.message}; ${gib} GiB are to be uploaded: free disk space at the NATS server, or raise ` +
        "max_file_store in its configuration",
      { cause: error },
    );
  }
}

interface WantedObject {
  kind: "shard" | "manifest";
  bytes: number;
  slices: () => AsyncIterable<Uint8Array> | Iterable<Uint8Array>;
}

/** All objects of a model by name. Equal shards of several parts are one. */
function wantedObjects(model: ModelManifest, tensors: TensorSource): Map<string, WantedObject> {
  const objects = new Map<string, WantedObject>();
  for (const { ref, manifest, json } of model.parts) {
    let offset = 0;
    for (const { digest, bytes } of manifest.shards) {
      const at = offset;
      const slices = () => readPart(tensors, manifest, at, bytes);
      objects.set(digest, { kind: "shard", bytes, slices });
      offset += bytes;
    }
    objects.set(ref.digest, { kind: "manifest", bytes: json.length, slices: () => [json] });
  }
  return objects;
}

/** Where a worker keeps parts. */
export interface PartStore {
  /** A manifest that is here already; null when it is not. */
  manifest(digest: string): Promise<Uint8Array | null>;
  putManifest(digest: string, manifest: Uint8Array<ArrayBuffer>): Promise<void>;
  /** Whether the shard is here, whole. */
  hasShard(shard: ShardRef): Promise<boolean>;
  putShard(digest: string, bytes: Uint8Array): Promise<void>;
}

/**
 * Brings a part into `store`, as far as it is not there.
 *
 * @param options.onProgress `doneBytes` of the part; the first call tells what was there already
 * @returns the part's manifest
 * @throws FleetError `not-found` when the part was never published; `bad-checkpoint` when what is
 * stored is not what its name says; `nats` when the store stays out of reach
 */
export async function fetchPart(
  options: WeightsOptions & {
    part: PartRef;
    store: PartStore;
    onProgress?: (progress: TransferProgress) => void;
  },
): Promise<PartManifest> {
  const { part, store } = options;
  const objects = new ObjectStore(options);
  const known = await store.manifest(part.digest);
  const json = known ?? await retrying(options, () => fetchObject(objects, part.digest));
  const manifest = parsePartManifest(json);
  if (manifest.part !== part.part || partBytes(manifest) !== part.bytes) {
    throw new FleetError("bad-checkpoint", `The manifest of ${part.part} is another part's`);
  }
  if (!known) await store.putManifest(part.digest, json as Uint8Array<ArrayBuffer>);
  const missing = new Map<string, ShardRef>();
  for (const shard of manifest.shards) {
    if (!missing.has(shard.digest) && !await store.hasShard(shard)) {
      missing.set(shard.digest, shard);
    }
  }
  const totalBytes = part.bytes;
  let doneBytes = totalBytes;
  for (const { digest, bytes } of manifest.shards) if (missing.has(digest)) doneBytes -= bytes;
  options.onProgress?.({ doneBytes, totalBytes });
  await inParallel([...missing.values()], LIMITS.maxShardsInFlight, async ({ digest, bytes }) => {
    const shard = await retrying(options, () => fetchObject(objects, digest, bytes));
    await store.putShard(digest, shard);
    doneBytes += bytes * manifest.shards.filter((other) => other.digest === digest).length;
    options.onProgress?.({ doneBytes, totalBytes });
  });
  return manifest;
}

/** A whole object, checked against the digest that is its name. */
async function fetchObject(
  objects: ObjectStore,
  digest: string,
  bytes?: number,
): Promise<Uint8Array<ArrayBuffer>> {
  const object = await objects.info(digest);
  if (!object) throw new FleetError("not-found", `The object store has no object ${digest}`);
  const corrupt = (what: string) =>
    new FleetError("bad-checkpoint", `Object ${digest} in the object store is corrupt: ${what}`);
  const limit = bytes ?? LIMITS.maxShardBytes;
  if (object.size > limit) throw corrupt(`it has ${object.size} bytes, at most ${limit} expected`);
  const out = new Uint8Array(object.size);
  const hash = createHash("sha256");
  let at = 0;
  for await (const chunk of objects.read(object)) {
    if (chunk.length > out.length - at) throw corrupt("its chunks are longer than it");
    out.set(chunk, at);
    hash.update(chunk);
    at += chunk.length;
  }
  if (at !== out.length) throw corrupt("its chunks are shorter than it");
  if (hash.digest("hex") !== digest) throw corrupt("its bytes have another digest");
  return out;
}

/** Repeats `action` while its failures may pass: NATS away, a message lost, bytes that arrive wrong. */
async function retrying<T>(options: WeightsOptions, action: () => Promise<T>): Promise<T> {
  const clock = options.clock ?? systemClock;
  let corrupt = 0;
  for (let tries = 1;; tries++) {
    options.signal?.throwIfAborted();
    try {
      return await action();
    } catch (error) {
      const code = error instanceof FleetError ? error.code : "internal";
      const passing = code === "nats" || code === "timeout" ||
        (code === "bad-checkpoint" && ++corrupt < TRIES_OF_CORRUPT);
      if (!passing || tries >= TRIES || options.connection.isClosed()) throw error;
      const pauseMs = Math.min(FIRST_PAUSE_MS * 2 ** (tries - 1), MAX_PAUSE_MS);
      await sleep(clock, pauseMs, options.signal);
    }
  }
}

/** Runs `action` on every item, `lanes` at a time; the first failure stops the lanes and is thrown. */
async function inParallel<T>(
  items: T[],
  lanes: number,
  action: (item: T) => Promise<void>,
): Promise<void> {
  let next = 0, failed = false;
  const lane = async () => {
    while (next < items.length && !failed) {
      try {
        await action(items[next++]);
      } catch (error) {
        failed = true;
        throw error;
      }
    }
  };
  const results = await Promise.allSettled(Array.from({ length: lanes }, lane));
  for (const result of results) if (result.status === "rejected") throw result.reason;
}
