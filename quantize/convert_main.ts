/**
 * `deno task convert --in DIR --out DIR`: checkpoints in AQLM's layout to CodeGEMM's.
 *
 * @module
 */
import { formatName, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { convertAqlm } from "./convert.ts";
import { directorySink, requireSpace } from "./directory.ts";

if (import.meta.main) {
  await runCommand(async () => {
    const { values } = parseFlags({
      command: "convert",
      summary: "Turns an AQLM checkpoint (2x8, 1x16, ...) into one that the fleet runs, exactly.",
      flags: {
        in: { type: "path", required: true, help: "directory of the AQLM checkpoint" },
        out: { type: "path", required: true, help: "directory to make; empty or not there yet" },
        "shard-size": {
          type: "bytes",
          default: 4 * 2 ** 30,
          min: 2 ** 20,
          help: "tensor bytes per file",
        },
      },
    });
    const format = await convertAqlm(
      directorySource(values.in),
      await directorySink(values.out),
      values["shard-size"],
      {
        onPlanned: (bytes) => requireSpace(values.out, bytes),
        onMatrix: (matrix, done, total) => console.error(`${done}/${total} ${matrix}`),
      },
    );
    await openCheckpoint(directorySource(values.out));
    console.error(`${values.out} is done, in ${formatName(format)}`);
  });
}
