/**
 * A checkpoint in a directory of this machine. The only file of the folder that touches Deno.
 *
 * @module
 */
import { FleetError } from "../errors.ts";
import { type FileSource, shortFile } from "./source.ts";

/**
 * The files of a directory, each opened for the time of one read. Links are followed (the Hugging
 * Face cache is made of them).
 *
 * @param path the directory
 */
export function directorySource(path: string): FileSource {
  const pathOf = (name: string) => `${path}/${name}`;
  return {
    async list() {
      const names: string[] = [];
      try {
        for await (const entry of Deno.readDir(path)) {
          if (entry.isFile || entry.isSymlink) names.push(entry.name);
        }
      } catch (cause) {
        throw fileError(path, cause);
      }
      return names.sort();
    },
    async size(name) {
      try {
        return (await Deno.stat(pathOf(name))).size;
      } catch (cause) {
        throw fileError(pathOf(name), cause);
      }
    },
    async read(name, offset, length) {
      try {
        using file = await Deno.open(pathOf(name), { read: true });
        await file.seek(offset, Deno.SeekMode.Start);
        const bytes = new Uint8Array(length);
        for (let filled = 0; filled < length;) {
          const count = await file.read(bytes.subarray(filled));
          if (count === null) throw shortFile(pathOf(name), offset + length, offset + filled);
          filled += count;
        }
        return bytes;
      } catch (cause) {
        throw fileError(pathOf(name), cause);
      }
    },
  };
}

function fileError(path: string, cause: unknown): FleetError {
  if (cause instanceof FleetError) return cause;
  if (cause instanceof Deno.errors.NotFound) {
    return new FleetError("not-found", `There is no ${path}`, { cause });
  }
  const why = cause instanceof Error ? cause.message : String(cause);
  return new FleetError("disk", `Cannot read ${path}: ${why}`, { cause });
}
