/**
 * Parts of a model: what is moved and held as a whole (a layer, the embedding, the output head).
 *
 * A part's bytes are its tensors one after the other, largest first, each on a multiple of 16 with
 * zeros between; they are cut into shards of one size. A manifest lists both; the SHA-256 of its
 * canonical JSON names the part, so equal names mean equal weights wherever they come from. The model's
 * digest is taken over its config and its parts' digests.
 *
 * @module
 */
import { createHash } from "node:crypto";
import { z } from "zod";
import { allParts, type Checkpoint, partTensors } from "./checkpoint/mod.ts";
import { FleetError } from "./errors.ts";
import { LIMITS } from "./limits.ts";
import {
  type DType,
  DTYPE_BYTES,
  type PartName,
  type TensorInfo,
  type TensorSource,
} from "./model_config.ts";
import type { PartRef } from "./protocol.ts";

/** Raised with every change of the layout. */
const VERSION = 1;
/** Tensors start on multiples of this, so that any typed array can view them. */
const ALIGN = 16;
/** Read and hashed at a time. */
const SLICE_BYTES = 4 * 1024 * 1024;

const hex256 = z.string().regex(/^[0-9a-f]{64}$/);
const count = z.number().int().min(0).max(Number.MAX_SAFE_INTEGER);

const PartManifest = z.strictObject({
  version: z.literal(VERSION),
  part: z.string().regex(/^(embedding|head|layer\.\d{1,5})$/),
  tensors: z.array(z.strictObject({
    name: z.string().max(256),
    dtype: z.enum(Object.keys(DTYPE_BYTES) as [DType, ...DType[]]),
    shape: z.array(count).max(8),
    offset: count,
    bytes: count,
  })).max(256),
  shards: z.array(z.strictObject({
    digest: hex256,
    bytes: z.number().int().min(1).max(LIMITS.maxShardBytes),
  })).max(4096),
});

/** What a part consists of. */
export type PartManifest = z.infer<typeof PartManifest>;
/** A shard of a part. */
export type ShardRef = PartManifest["shards"][number];

/** A part with its manifest. */
export interface DescribedPart {
  ref: PartRef;
  manifest: PartManifest;
  /** The manifest's canonical JSON: what `ref.digest` is the SHA-256 of. */
  json: Uint8Array<ArrayBuffer>;
}

/** A model cut into parts. */
export interface ModelManifest {
  digest: string;
  /** In the order of the forward pass. */
  parts: DescribedPart[];
  bytes: number;
}

/** How a model is cut. */
export interface DescribeOptions {
  /** All shards of a part but its last have this size; `LIMITS.maxShardBytes` when absent. */
  shardBytes?: number;
  /** Called as bytes are hashed. */
  onProgress?: (doneBytes: number) => void;
}

/** SHA-256 in hex. */
export function sha256Hex(...pieces: Uint8Array[]): string {
  const hash = createHash("sha256");
  for (const piece of pieces) hash.update(piece);
  return hash.digest("hex");
}

/** Cuts a whole model. Reads and hashes it once, a slice at a time. */
export async function describeParts(
  checkpoint: Checkpoint,
  options: DescribeOptions = {},
): Promise<ModelManifest> {
  const parts: DescribedPart[] = [];
  let bytes = 0;
  for (const part of allParts(checkpoint.config)) {
    const before = bytes;
    const described = await describePart(checkpoint, part, {
      ...options,
      onProgress: (done) => options.onProgress?.(before + done),
    });
    parts.push(described);
    bytes += described.ref.bytes;
  }
  const digest = sha256Hex(canonicalJson({
    version: VERSION,
    config: sha256Hex(new TextEncoder().encode(checkpoint.configJson)),
    parts: parts.map(({ ref }) => ({ part: ref.part, digest: ref.digest })),
  }));
  return { digest, parts, bytes };
}

/** Cuts one part. */
export async function describePart(
  checkpoint: Checkpoint,
  part: PartName,
  options: DescribeOptions = {},
): Promise<DescribedPart> {
  const shardBytes = options.shardBytes ?? LIMITS.maxShardBytes;
  const manifest: PartManifest = { version: VERSION, part, tensors: [], shards: [] };
  let bytes = 0;
  // Largest first, so that a tied output head shares all full shards with the embedding.
  const infos = partTensors(checkpoint.config, part, (name) => checkpoint.has(name))
    .map((name) => checkpoint.info(name))
    .sort((a, b) => b.bytes - a.bytes);
  for (const { name, dtype, shape, bytes: tensorBytes } of infos) {
    const offset = Math.ceil(bytes / ALIGN) * ALIGN;
    manifest.tensors.push({ name, dtype, shape: [...shape], offset, bytes: tensorBytes });
    bytes = offset + tensorBytes;
  }
  let done = 0;
  for (let at = 0; at < bytes; at += shardBytes) {
    const length = Math.min(shardBytes, bytes - at);
    const hash = createHash("sha256");
    for await (const slice of readPart(checkpoint, manifest, at, length)) {
      hash.update(slice);
      options.onProgress?.(done += slice.length);
    }
    manifest.shards.push({ digest: hash.digest("hex"), bytes: length });
  }
  const json = canonicalJson(manifest);
  return { ref: { part, digest: sha256Hex(json), bytes }, manifest, json };
}

/** Bytes of a part. */
export function partBytes(manifest: PartManifest): number {
  return manifest.shards.reduce((sum, shard) => sum + shard.bytes, 0);
}

/** Bytes `[offset, offset + length)` of a part, in slices, put together from a checkpoint's tensors. */
export async function* readPart(
  tensors: TensorSource,
  manifest: Pick<PartManifest, "tensors">,
  offset: number,
  length: number,
): AsyncGenerator<Uint8Array<ArrayBuffer>> {
  const end = offset + length;
  let at = offset;
  for (const tensor of manifest.tensors) {
    if (at < tensor.offset && at < end) {
      yield new Uint8Array(Math.min(tensor.offset, end) - at);
      at = Math.min(tensor.offset, end);
    }
    const tensorEnd = Math.min(tensor.offset + tensor.bytes, end);
    while (at >= tensor.offset && at < tensorEnd) {
      const slice = Math.min(SLICE_BYTES, tensorEnd - at);
      yield await tensors.read(tensor.name, at - tensor.offset, slice);
      at += slice;
    }
  }
}

/**
 * A manifest from its JSON.
 *
 * @throws FleetError `bad-checkpoint` when it is none, or its tensors do not fit its shards
 */
export function parsePartManifest(json: Uint8Array): PartManifest {
  let parsed: PartManifest;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(json);
    parsed = PartManifest.parse(JSON.parse(text));
  } catch (cause) {
    throw new FleetError("bad-checkpoint", "A part's manifest is malformed", { cause });
  }
  const bad = (what: string) =>
    new FleetError("bad-checkpoint", `The manifest of ${parsed.part} is malformed: ${what}`);
  let end = 0;
  const names = new Set<string>();
  for (const { name, dtype, shape, offset, bytes } of parsed.tensors) {
    if (names.has(name)) throw bad(`${name} is listed twice`);
    names.add(name);
    if (shape.reduce((product, size) => product * size, DTYPE_BYTES[dtype]) !== bytes) {
      throw bad(`${name} has not the bytes of its shape`);
    }
    if (offset !== Math.ceil(end / ALIGN) * ALIGN) throw bad(`${name} is not where it should be`);
    end = offset + bytes;
  }
  if (partBytes(parsed) !== end) throw bad("its shards are not as long as its tensors");
  const [first] = parsed.shards;
  if (parsed.shards.some(({ bytes }, i, all) => i < all.length - 1 && bytes !== first.bytes)) {
    throw bad("its shards differ in size");
  }
  return parsed;
}

/** Bytes `[offset, offset + length)` of a shard, in a buffer of the caller's own. */
export type ReadShard = (
  digest: string,
  offset: number,
  length: number,
) => Promise<Uint8Array<ArrayBuffer>>;

/** The tensors of parts whose shards can be read. */
export class PartTensorSource implements TensorSource {
  readonly #tensors = new Map<string, { info: TensorInfo; offset: number; shards: ShardRef[] }>();
  readonly #readShard: ReadShard;

  constructor(manifests: PartManifest[], readShard: ReadShard) {
    this.#readShard = readShard;
    for (const { tensors, shards } of manifests) {
      for (const { offset, ...info } of tensors) {
        this.#tensors.set(info.name, { info, offset, shards });
      }
    }
  }

  names(): string[] {
    return [...this.#tensors.keys()];
  }

  has(name: string): boolean {
    return this.#tensors.has(name);
  }

  info(name: string): TensorInfo {
    return this.#tensor(name).info;
  }

  async read(name: string, offset: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
    const tensor = this.#tensor(name);
    if (offset < 0 || length < 0 || offset + length > tensor.info.bytes) {
      throw new FleetError(
        "bad-checkpoint",
        `${name} has ${tensor.info.bytes} bytes, ${length} at ${offset} were asked for`,
      );
    }
    const out = new Uint8Array(length);
    const from = tensor.offset + offset;
    const shardBytes = tensor.shards[0]?.bytes ?? 1;
    for (let done = 0; done < length;) {
      const index = Math.floor((from + done) / shardBytes);
      const within = from + done - index * shardBytes;
      const { digest, bytes } = tensor.shards[index];
      const wanted = Math.min(length - done, bytes - within);
      const piece = await this.#readShard(digest, within, wanted);
      if (piece.length !== wanted) {
        throw new FleetError(
          "bad-checkpoint",
          `Shard ${digest} is shorter than its ${bytes} bytes`,
        );
      }
      if (wanted === length) return piece;
      out.set(piece, done);
      done += wanted;
    }
    return out;
  }

  #tensor(name: string) {
    const tensor = this.#tensors.get(name);
    if (!tensor) throw new FleetError("bad-checkpoint", `The parts have no tensor ${name}`);
    return tensor;
  }
}

/** JSON with keys in the order of their making and no spaces. */
function canonicalJson(value: unknown): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(JSON.stringify(value));
}
