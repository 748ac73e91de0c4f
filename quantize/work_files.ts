/**
 * Files of a quantization under way: spilled activations, finished blocks, and how far it has come.
 *
 * @module
 */
import type { FileSource } from "../shared/checkpoint/mod.ts";
import type { FileSink } from "./writer.ts";

/** Files that are written, read back, and removed in the end. */
export interface WorkFiles extends FileSource, FileSink {
  /** Resolves when what was written of a file is on the disk, and outlasts a power cut. */
  sync(name: string): Promise<void>;
  /** Puts a file in another's place, at once or not at all. */
  rename(from: string, to: string): Promise<void>;
  /** Removes a file where there is one. */
  remove(name: string): Promise<void>;
  /** Removes all. */
  clear(): Promise<void>;
}

/** Work files in memory. */
export function memoryWork(files: Map<string, Uint8Array<ArrayBuffer>> = new Map()): WorkFiles {
  return {
    list: () => Promise.resolve([...files.keys()]),
    size: (name) => Promise.resolve(files.get(name)!.length),
    read: (name, offset, length) =>
      Promise.resolve(files.get(name)!.slice(offset, offset + length)),
    write(name, offset, bytes) {
      const old = files.get(name) ?? new Uint8Array();
      const grown = old.length >= offset + bytes.length
        ? old
        : new Uint8Array(offset + bytes.length);
      if (grown !== old) grown.set(old);
      grown.set(bytes, offset);
      files.set(name, grown);
      return Promise.resolve();
    },
    sync: () => Promise.resolve(),
    rename(from, to) {
      files.set(to, files.get(from)!);
      files.delete(from);
      return Promise.resolve();
    },
    remove(name) {
      files.delete(name);
      return Promise.resolve();
    },
    clear() {
      files.clear();
      return Promise.resolve();
    },
  };
}
