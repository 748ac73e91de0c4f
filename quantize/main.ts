/**
 * `deno task quantize --in DIR --out DIR --format m1v4g128`
 *
 * @module
 */
import { openCheckpoint } from "../shared/checkpoint/mod.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { systemClock } from "../shared/clock.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { bitsPerWeight } from "../shared/model_config.ts";
import { quantizeCheckpoint } from "./checkpoint.ts";
import { parseFormat } from "./format.ts";
import { directorySink } from "./directory.ts";

async function main(): Promise<void> {
  const { values } = parseFlags({
    command: "quantize",
    summary: "Turns a float checkpoint of a Llama-family model into one of CodeGEMM format.",
    flags: {
      in: { type: "string", required: true, help: "directory of the float checkpoint" },
      out: { type: "string", required: true, help: "directory to make; empty or not there yet" },
      format: {
        type: "string",
        default: "m1v4g128",
        help: "mXvYgZ: X codebooks, Y weights per code, Z weights per scale",
      },
      keep: {
        type: "string",
        default: "",
        help: "matrices that stay float16, by parts of their names: mlp.down_proj,layers.0",
      },
      rounds: {
        type: "integer",
        default: 12,
        min: 0,
        max: 1000,
        help: "training rounds over all codebooks of a matrix",
      },
      samples: {
        type: "integer",
        default: 2 ** 17,
        min: 256,
        max: 2 ** 24,
        help: "vectors of a matrix that its codebooks are trained on",
      },
      seed: { type: "integer", default: 1, min: 0, max: 2 ** 31, help: "of every random choice" },
      "shard-size": {
        type: "bytes",
        default: 4 * 2 ** 30,
        min: 2 ** 20,
        help: "tensor bytes per file",
      },
    },
  });
  const format = parseFormat(values.format);
  const checkpoint = await openCheckpoint(directorySource(values.in));
  const sink = await directorySink(values.out);
  console.error(
    `Quantizing ${values.in} to ${values.format}: ${bitsPerWeight(format)} bits per weight`,
  );
  const report = await quantizeCheckpoint(
    checkpoint,
    format,
    {
      rounds: values.rounds,
      sampleVectors: values.samples,
      seed: values.seed,
      keep: values.keep.split(",").map((part) => part.trim()).filter(Boolean),
      maxShardBytes: values["shard-size"],
    },
    sink,
    {
      clock: systemClock,
      onMatrix({ name, relativeError, seconds }, done, total) {
        const error = (100 * relativeError).toFixed(2);
        console.error(`${done}/${total} ${name}: error ${error} %, ${seconds.toFixed(1)} s`);
      },
    },
  );
  // What was written is read back as any reader would: headers, shapes, config.
  await openCheckpoint(directorySource(values.out));
  console.error(`${values.out} is done, in ${report.seconds.toFixed(0)} s`);
}

if (import.meta.main) await runCommand(main);
