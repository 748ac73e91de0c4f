/**
 * Directories of this machine as the place a checkpoint is written to, and where the work on it lies.
 *
 * @module
 */
import { statfs } from "node:fs/promises";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { FleetError } from "../shared/errors.ts";
import type { WorkFiles } from "./work_files.ts";
import type { FileSink } from "./writer.ts";

/** Where work files lie, inside the output directory. */
const WORK = ".quantize";

/**
 * Makes the directory, or takes it when it is empty.
 *
 * @throws FleetError `disk` when something is in it already, or it cannot be made
 */
export async function directorySink(path: string): Promise<FileSink> {
  await claim(path, () => false);
  return sinkAt(path);
}

/**
 * Makes a directory with room for work files, or takes one again in which work was begun.
 *
 * @throws FleetError `disk` when it holds something else, or cannot be made
 */
export async function workDirectory(path: string): Promise<{ sink: FileSink; work: WorkFiles }> {
  let begun = false;
  try {
    begun = (await Deno.stat(`${path}/${WORK}`)).isDirectory;
  } catch (cause) {
    if (!(cause instanceof Deno.errors.NotFound)) throw diskError(path, cause);
  }
  await claim(path, () => begun);
  const inside = `${path}/${WORK}`;
  const guarded = async (name: string, work: () => Promise<void>) => {
    try {
      await work();
    } catch (cause) {
      throw diskError(`${inside}/${name}`, cause);
    }
  };
  await guarded("", () => Deno.mkdir(inside, { recursive: true }));
  return {
    sink: sinkAt(path),
    work: {
      ...directorySource(inside),
      ...sinkAt(inside),
      sync: (name) =>
        guarded(name, async () => {
          using file = await Deno.open(`${inside}/${name}`, { write: true });
          await file.sync();
        }),
      rename: (from, to) =>
        guarded(from, () => Deno.rename(`${inside}/${from}`, `${inside}/${to}`)),
      remove: (name) =>
        guarded(name, async () => {
          try {
            await Deno.remove(`${inside}/${name}`);
          } catch (cause) {
            if (!(cause instanceof Deno.errors.NotFound)) throw cause;
          }
        }),
      clear: () => guarded("", () => Deno.remove(inside, { recursive: true })),
    },
  };
}

/**
 * Refuses work that a directory's disk has no room for, before any is done. Without permission to ask
 * (`--allow-sys=statfs`) it is let through: a full disk then ends it where it stands, and it can go on.
 *
 * @param path a directory that is there
 * @param bytes that all files will take at most, those that lie there already included
 * @throws FleetError `disk`
 */
export async function requireSpace(
  path: string,
  bytes: number,
  freeBytes: (path: string) => Promise<number | null> = diskFree,
): Promise<void> {
  const free = await freeBytes(path);
  if (free === null) return;
  const needed = bytes - await bytesIn(path);
  if (needed <= free) return;
  const gib = (size: number) => `${(size / 2 ** 30).toFixed(2)} GiB`;
  throw new FleetError(
    "disk",
    `The disk of ${path} is too full: ${gib(needed)} are needed for the work and its result, ` +
      `${gib(free)} are free; free some, or name another --out`,
  );
}

async function diskFree(path: string): Promise<number | null> {
  try {
    const { bavail, bsize } = await statfs(path);
    return bavail * bsize;
  } catch (cause) {
    if (cause instanceof Deno.errors.NotCapable) return null;
    throw diskError(path, cause);
  }
}

/** Sizes of all files in a directory and those below it. */
async function bytesIn(path: string): Promise<number> {
  let bytes = 0;
  for await (const { name, isDirectory } of Deno.readDir(path)) {
    const inside = `${path}/${name}`;
    bytes += isDirectory ? await bytesIn(inside) : (await Deno.stat(inside)).size;
  }
  return bytes;
}

/** Makes a directory that nothing is in except what is `ours`. */
async function claim(path: string, ours: (name: string) => boolean): Promise<void> {
  try {
    await Deno.mkdir(path, { recursive: true });
    for await (const entry of Deno.readDir(path)) {
      if (ours(entry.name)) continue;
      throw new FleetError(
        "disk",
        `${path} is not empty (it holds ${entry.name}); name a new directory, nothing is overwritten`,
      );
    }
  } catch (cause) {
    throw diskError(path, cause);
  }
}

function sinkAt(path: string): FileSink {
  return {
    async write(name, offset, bytes) {
      try {
        using file = await Deno.open(`${path}/${name}`, { write: true, create: true });
        await file.seek(offset, Deno.SeekMode.Start);
        for (let done = 0; done < bytes.length;) done += await file.write(bytes.subarray(done));
      } catch (cause) {
        throw diskError(`${path}/${name}`, cause);
      }
    },
  };
}

function diskError(path: string, cause: unknown): FleetError {
  if (cause instanceof FleetError) return cause;
  const why = cause instanceof Error ? cause.message : String(cause);
  return new FleetError("disk", `Cannot write ${path}: ${why}`, { cause });
}
