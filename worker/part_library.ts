/**
 * Parts from wherever they are nearest: a checkpoint on this machine, the disk cache, or the object
 * store by way of the cache.
 *
 * @module
 */
import type { Checkpoint } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import type { PartName } from "../shared/model_config.ts";
import { describePart, type PartManifest } from "../shared/parts.ts";
import type { PartRef } from "../shared/protocol.ts";
import type { TransferProgress } from "../shared/weights.ts";
import type { PartCache } from "./cache.ts";
import type { PartLocation } from "./part_location.ts";
import type { PartProgress, PartProvider } from "./worker.ts";

/** What a library draws on. */
export interface LibraryOptions {
  cache: PartCache;
  /** Brings a part into the cache, as far as it is not there; the first progress tells how far. */
  fetch: (
    part: PartRef,
    onProgress: (progress: TransferProgress) => void,
    signal: AbortSignal,
  ) => Promise<PartManifest>;
  /** Its parts are read in place where their digests are right. */
  checkpoint?: { directory: string; checkpoint: Checkpoint };
  log?: (line: string) => void;
}

/** The parts of one machine. */
export class PartLibrary implements PartProvider<PartLocation> {
  readonly #options: LibraryOptions;
  /** Digests of the checkpoint's parts, of those that were asked for. */
  readonly #onDisk = new Map<PartName, string | null>();

  constructor(options: LibraryOptions) {
    this.#options = options;
  }

  held(): string[] {
    const onDisk = [...this.#onDisk.values()].filter((digest) => digest !== null);
    return [...new Set([...this.#options.cache.held(), ...onDisk])];
  }

  async provide(
    parts: PartRef[],
    onProgress: (progress: PartProgress) => void,
    signal: AbortSignal,
  ): Promise<PartLocation[]> {
    const { cache, checkpoint } = this.#options;
    const locations = new Map<PartRef, PartLocation>();
    for (const part of parts) {
      signal.throwIfAborted();
      if (checkpoint && await this.#isOnDisk(part, checkpoint.checkpoint, onProgress)) {
        locations.set(part, { from: "disk", directory: checkpoint.directory });
      }
    }
    const others = parts.filter((part) => !locations.has(part));
    const inUse = new Set(others.map(({ digest }) => digest));
    const missing = others.reduce((sum, part) => sum + cache.missingBytes(part), 0);
    await cache.makeRoom(inUse, missing);
    for (const part of others) {
      const manifest = await this.#fetch(part, onProgress, signal);
      locations.set(part, { from: "cache", directory: cache.shardDirectory, manifest });
    }
    return parts.map((part) => locations.get(part)!);
  }

  #fetch(
    part: PartRef,
    onProgress: (progress: PartProgress) => void,
    signal: AbortSignal,
  ): Promise<PartManifest> {
    let from: PartProgress["from"] = "cache";
    const tell = ({ doneBytes }: TransferProgress) => {
      onProgress({ part: part.part, doneBytes, from });
      from = "store";
    };
    return this.#options.fetch(part, tell, signal);
  }

  /** Whether the checkpoint's part is the one asked for: hashed once, then remembered. */
  async #isOnDisk(
    part: PartRef,
    checkpoint: Checkpoint,
    onProgress: (progress: PartProgress) => void,
  ): Promise<boolean> {
    const name = part.part as PartName;
    let digest = this.#onDisk.get(name);
    if (digest === undefined) {
      digest = await this.#digestOnDisk(
        name,
        checkpoint,
        (doneBytes) =>
          onProgress({ part: name, doneBytes: Math.min(doneBytes, part.bytes), from: "disk" }),
      );
      this.#onDisk.set(name, digest);
    }
    if (digest === part.digest) return true;
    this.#options.log?.(`--model has another ${name} than the fleet; it is fetched`);
    return false;
  }

  /** Null when the checkpoint has no such part. */
  async #digestOnDisk(
    part: PartName,
    checkpoint: Checkpoint,
    onProgress: (doneBytes: number) => void,
  ): Promise<string | null> {
    try {
      return (await describePart(checkpoint, part, { onProgress })).ref.digest;
    } catch (error) {
      if (error instanceof FleetError && error.code === "bad-checkpoint") return null;
      throw error;
    }
  }
}
