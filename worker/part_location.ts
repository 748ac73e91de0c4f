/**
 * Where a part's bytes lie on this machine's disk: said by one thread, opened by another.
 *
 * @module
 */
import { directorySource } from "../shared/checkpoint/directory.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";
import { type PartManifest, PartTensorSource } from "../shared/parts.ts";
import type { ReadablePart } from "./model_loader.ts";

/** A part that can be read; its bytes were checked against its digest. */
export type PartLocation =
  /** In a checkpoint. */
  | { from: "disk"; directory: string }
  /** In shards, each in a file named by its digest. */
  | { from: "cache"; directory: string; manifest: PartManifest };

/**
 * Opens parts, in the order given; each checkpoint once.
 *
 * @throws FleetError `bad-checkpoint`, `not-found`, `disk`
 */
export async function openParts(locations: PartLocation[]): Promise<ReadablePart[]> {
  const checkpoints = new Map<string, ReadablePart>();
  const parts: ReadablePart[] = [];
  for (const location of locations) {
    const { from, directory } = location;
    const files = directorySource(directory);
    if (location.from === "cache") {
      const read = (digest: string, offset: number, length: number) =>
        files.read(digest, offset, length);
      parts.push({ from, tensors: new PartTensorSource([location.manifest], read) });
      continue;
    }
    let checkpoint = checkpoints.get(directory);
    if (!checkpoint) {
      checkpoint = { from, tensors: await openCheckpoint(files) };
      checkpoints.set(directory, checkpoint);
    }
    parts.push(checkpoint);
  }
  return parts;
}
