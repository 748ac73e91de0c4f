/**
 * Where a checkpoint's files come from: a directory, a test's memory, later a browser's file picker.
 *
 * @module
 */
import { FleetError } from "../errors.ts";

/** Files by plain name (no folders); large ones are read in slices. */
export interface FileSource {
  /** Names of all files, in any order. */
  list(): Promise<string[]>;
  /**
   * Bytes of a file.
   *
   * @throws FleetError `not-found` when there is no such file
   */
  size(name: string): Promise<number>;
  /**
   * Exactly `length` bytes from `offset` on, in a buffer of the caller's own.
   *
   * @throws FleetError `not-found` when there is no such file, `bad-checkpoint` when it ends before
   */
  read(name: string, offset: number, length: number): Promise<Uint8Array<ArrayBuffer>>;
}

/** The error of a read past the end, the same from every source. */
export function shortFile(name: string, wanted: number, size: number): FleetError {
  return new FleetError(
    "bad-checkpoint",
    `${name} ends at byte ${size}, but byte ${wanted} was asked for; it is truncated or was cut while being read`,
  );
}

/**
 * Files in memory.
 *
 * @param files bytes or text by name
 */
export function memorySource(files: Record<string, Uint8Array | string>): FileSource {
  const bytesOf = (name: string): Uint8Array => {
    const file = Object.hasOwn(files, name) ? files[name] : undefined;
    if (file === undefined) throw new FleetError("not-found", `There is no file ${name}`);
    return typeof file === "string" ? new TextEncoder().encode(file) : file;
  };
  return {
    list: () => Promise.resolve(Object.keys(files)),
    // deno-lint-ignore require-await -- async, so that a missing file rejects instead of throwing
    size: async (name) => bytesOf(name).length,
    // deno-lint-ignore require-await
    read: async (name, offset, length) => {
      const bytes = bytesOf(name);
      if (offset + length > bytes.length) throw shortFile(name, offset + length, bytes.length);
      return new Uint8Array(bytes.subarray(offset, offset + length));
    },
  };
}

/**
 * A whole text file, or undefined when it is not there.
 *
 * @param maxBytes a larger file is refused before it is read
 * @throws FleetError `bad-checkpoint` when it is larger, or not UTF-8
 */
export async function readText(
  files: FileSource,
  names: ReadonlySet<string>,
  name: string,
  maxBytes: number,
): Promise<string | undefined> {
  if (!names.has(name)) return undefined;
  const size = await files.size(name);
  if (size > maxBytes) {
    throw new FleetError(
      "bad-checkpoint",
      `${name} has ${size} bytes; at most ${maxBytes} are believable for such a file`,
    );
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await files.read(name, 0, size));
  } catch (cause) {
    if (cause instanceof FleetError) throw cause;
    throw new FleetError("bad-checkpoint", `${name} is not UTF-8 text`, { cause });
  }
}

/**
 * Parsed JSON whose top level is an object.
 *
 * @throws FleetError `bad-checkpoint` that names the file
 */
export function parseJsonObject(name: string, text: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new FleetError("bad-checkpoint", `${name} is not JSON: ${why}`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new FleetError("bad-checkpoint", `${name} is not a JSON object`);
  }
  return value as Record<string, unknown>;
}
