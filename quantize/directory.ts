/**
 * A directory of this machine as the place a checkpoint is written to.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import type { FileSink } from "./writer.ts";

/**
 * Makes the directory, or takes it when it is empty.
 *
 * @throws FleetError `disk` when something is in it already, or it cannot be made
 */
export async function directorySink(path: string): Promise<FileSink> {
  try {
    await Deno.mkdir(path, { recursive: true });
    for await (const entry of Deno.readDir(path)) {
      throw new FleetError(
        "disk",
        `${path} is not empty (it holds ${entry.name}); name a new directory, nothing is overwritten`,
      );
    }
  } catch (cause) {
    throw diskError(path, cause);
  }
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
