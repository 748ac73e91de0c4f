/**
 * Parts on the worker's disk: manifests and shards, each in a file named by its SHA-256. Files are
 * written under a temporary name and renamed, so a crash never leaves a lying one; what an earlier
 * process left is hashed before it is believed. Several workers of one machine may share a directory.
 *
 * ```
 * DIR/parts/<digest>    a part's manifest, written before its shards
 * DIR/shards/<digest>   at most LIMITS.maxShardBytes
 * ```
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import { sha256Hex, type ShardRef } from "../shared/parts.ts";
import type { PartStore } from "../shared/weights.ts";

/** How a cache is kept. */
export interface CacheOptions {
  directory: string;
  /** Parts that are not in use go, the longest unused first, to stay under this. */
  limitBytes: number;
  /** The shards that a manifest lists; throws when it is none. */
  shardsOf: (manifest: Uint8Array<ArrayBuffer>) => ShardRef[];
  /** Writes a new file; `Deno.writeFile` when absent. */
  writeFile?: (path: string, bytes: Uint8Array) => Promise<void>;
}

interface CachedPart {
  digest: string;
  manifest: Uint8Array<ArrayBuffer>;
  shards: ShardRef[];
  usedAtMs: number;
}

/** Older temporary files and shards that no manifest names were left by a crash. */
const STALE_AFTER_MS = 3_600_000;
const DIGEST = /^[0-9a-f]{64}$/;

/** The cache of one directory. */
export class PartCache implements PartStore {
  readonly #options: CacheOptions;
  readonly #parts = new Map<string, CachedPart>();
  /** Bytes of each shard on disk, whoever wrote it. */
  readonly #shards = new Map<string, number>();
  /** Shards whose bytes were hashed by this process. */
  readonly #verified = new Set<string>();

  private constructor(options: CacheOptions) {
    this.#options = options;
  }

  /**
   * Opens a directory, making it where it is missing.
   *
   * @throws FleetError `disk` when it cannot be read or written
   */
  static async open(options: CacheOptions): Promise<PartCache> {
    const cache = new PartCache(options);
    try {
      await Deno.mkdir(cache.#folder("parts"), { recursive: true });
      await Deno.mkdir(cache.#folder("shards"), { recursive: true });
      await cache.#scan();
    } catch (error) {
      throw cache.#explain(error, "open");
    }
    return cache;
  }

  /** Bytes of all files. */
  get bytes(): number {
    let sum = 0;
    for (const bytes of this.#shards.values()) sum += bytes;
    for (const { manifest } of this.#parts.values()) sum += manifest.length;
    return sum;
  }

  /** Digests of the parts that are here as a whole. */
  held(): string[] {
    return [...this.#parts.values()]
      .filter(({ shards }) => shards.every(({ digest }) => this.#shards.has(digest)))
      .map(({ digest }) => digest);
  }

  /** Bytes of a part that are not here, as far as file names and sizes tell. */
  missingBytes({ digest, bytes }: { digest: string; bytes: number }): number {
    const part = this.#parts.get(digest);
    if (!part) return bytes;
    const missing = part.shards.filter((shard) => this.#shards.get(shard.digest) !== shard.bytes);
    return missing.reduce((sum, shard) => sum + shard.bytes, 0);
  }

  /** A part's manifest, which marks the part as used; null when it is not here. */
  async manifest(digest: string): Promise<Uint8Array<ArrayBuffer> | null> {
    const part = this.#parts.get(digest);
    if (!part) return null;
    part.usedAtMs = Date.now();
    const now = new Date(part.usedAtMs);
    // Only the order of eviction after a restart depends on it.
    await Deno.utime(this.#path("parts", digest), now, now).catch(() => {});
    return part.manifest;
  }

  /** @throws FleetError `disk`; `bad-checkpoint` when it is not what its digest says */
  async putManifest(digest: string, manifest: Uint8Array<ArrayBuffer>): Promise<void> {
    this.#check(digest, manifest, "manifest");
    const shards = this.#options.shardsOf(manifest);
    await this.#write(this.#path("parts", digest), manifest);
    this.#parts.set(digest, { digest, manifest, shards, usedAtMs: Date.now() });
  }

  /** Whether a shard is here and its bytes are its digest's; a lying file is removed. */
  async hasShard({ digest, bytes }: ShardRef): Promise<boolean> {
    const path = this.#path("shards", digest);
    if (!this.#verified.has(digest)) {
      const stored = await Deno.readFile(path).catch(() => null);
      if (!stored || stored.length !== bytes || sha256Hex(stored) !== digest) {
        if (stored) await this.#remove("shards", digest);
        return false;
      }
      this.#verified.add(digest);
    } else if (!await exists(path)) {
      // Another worker of this machine made room.
      this.#forget(digest);
      return false;
    }
    this.#shards.set(digest, bytes);
    return true;
  }

  /** @throws FleetError `disk`; `bad-checkpoint` when it is not what its digest says */
  async putShard(digest: string, bytes: Uint8Array): Promise<void> {
    this.#check(digest, bytes, "shard");
    await this.#write(this.#path("shards", digest), bytes);
    this.#shards.set(digest, bytes.length);
    this.#verified.add(digest);
  }

  /** Where shards lie, each under its digest. */
  get shardDirectory(): string {
    return this.#folder("shards");
  }

  /**
   * Makes room by removing parts that are not in use, the longest unused first.
   *
   * @param inUse digests of parts that must stay
   * @param neededBytes of the files to be written next
   * @throws FleetError `disk` when the limit is too small for what is in use
   */
  async makeRoom(inUse: ReadonlySet<string>, neededBytes: number): Promise<void> {
    const { limitBytes, directory } = this.#options;
    const idle = [...this.#parts.values()]
      .filter(({ digest }) => !inUse.has(digest))
      .sort((a, b) => a.usedAtMs - b.usedAtMs);
    while (this.bytes + neededBytes > limitBytes) {
      const oldest = idle.shift();
      if (!oldest) {
        throw new FleetError(
          "disk",
          `The parts of this stage take ${
            gib(this.bytes + neededBytes)
          } in ${directory}, the cache ` +
            `may hold ${gib(limitBytes)}; raise --cache-limit`,
        );
      }
      await this.#evict(oldest);
    }
  }

  async #evict(part: CachedPart): Promise<void> {
    this.#parts.delete(part.digest);
    await this.#remove("parts", part.digest);
    const named = new Set(
      [...this.#parts.values()].flatMap(({ shards }) => shards.map(({ digest }) => digest)),
    );
    for (const { digest } of part.shards) {
      if (named.has(digest)) continue;
      await this.#remove("shards", digest);
      this.#forget(digest);
    }
  }

  /** Shards first: a manifest is written before its shards, so none of a new part looks orphaned. */
  async #scan(): Promise<void> {
    const shards = await this.#list("shards");
    for (const { name, size } of shards) this.#shards.set(name, size);
    for (const { name, mtimeMs } of await this.#list("parts")) {
      const manifest = await Deno.readFile(this.#path("parts", name)).catch(() => null);
      if (!manifest) continue;
      try {
        this.#check(name, manifest, "manifest");
        const listed = this.#options.shardsOf(manifest);
        this.#parts.set(name, { digest: name, manifest, shards: listed, usedAtMs: mtimeMs });
      } catch {
        await this.#remove("parts", name);
      }
    }
    const named = new Set(
      [...this.#parts.values()].flatMap((part) => part.shards.map(({ digest }) => digest)),
    );
    for (const { name, mtimeMs } of shards) {
      if (named.has(name) || Date.now() - mtimeMs < STALE_AFTER_MS) continue;
      await this.#remove("shards", name);
      this.#forget(name);
    }
  }

  /** The files of a folder; temporary ones that a crash left are removed. */
  async #list(folder: "parts" | "shards") {
    const files: { name: string; size: number; mtimeMs: number }[] = [];
    for await (const { name } of Deno.readDir(this.#folder(folder))) {
      const path = `${this.#folder(folder)}/${name}`;
      const info = await Deno.stat(path).catch(() => null);
      if (!info?.isFile) continue;
      const mtimeMs = info.mtime?.getTime() ?? 0;
      if (DIGEST.test(name)) files.push({ name, size: info.size, mtimeMs });
      else if (Date.now() - mtimeMs > STALE_AFTER_MS) await Deno.remove(path).catch(() => {});
    }
    return files;
  }

  async #write(path: string, bytes: Uint8Array): Promise<void> {
    const temporary = `${path}.${crypto.randomUUID()}`;
    try {
      await (this.#options.writeFile ?? Deno.writeFile)(temporary, bytes);
      await Deno.rename(temporary, path);
    } catch (error) {
      await Deno.remove(temporary).catch(() => {});
      throw this.#explain(error, "write to");
    }
  }

  async #remove(folder: "parts" | "shards", digest: string): Promise<void> {
    await Deno.remove(this.#path(folder, digest)).catch(() => {});
  }

  #forget(shard: string): void {
    this.#shards.delete(shard);
    this.#verified.delete(shard);
  }

  #check(digest: string, bytes: Uint8Array, what: string): void {
    if (sha256Hex(bytes) === digest) return;
    throw new FleetError("bad-checkpoint", `The bytes of ${what} ${digest} have another digest`);
  }

  #folder(name: "parts" | "shards"): string {
    return `${this.#options.directory}/${name}`;
  }

  #path(folder: "parts" | "shards", digest: string): string {
    return `${this.#folder(folder)}/${digest}`;
  }

  #explain(error: unknown, doing: string): FleetError {
    if (error instanceof FleetError) return error;
    const { directory } = this.#options;
    const code = (error as { code?: string }).code;
    const reason = error instanceof Error ? error.message : String(error);
    const what = code === "ENOSPC" || code === "EDQUOT"
      ? `The disk of the cache ${directory} is full (${reason}); free some of it, lower --cache-limit, ` +
        "or put the cache elsewhere with --cache DIR"
      : `Cannot ${doing} the cache ${directory} (${reason}); choose another with --cache DIR`;
    return new FleetError("disk", what, { cause: error });
  }
}

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(path).then(() => true, () => false);
}

function gib(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(2)} GiB`;
}
