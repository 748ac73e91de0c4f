/**
 * `deno task quantize --in DIR --out DIR --format m1v4g128 --calibration FILE`
 *
 * @module
 */
import { openCheckpoint } from "../shared/checkpoint/mod.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { systemClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { bitsPerWeight } from "../shared/model_config.ts";
import { Gpu } from "../kernels/gpu.ts";
import { type CalibratedSettings, quantizeCalibrated } from "./calibrated.ts";
import { cutSequences } from "./calibration_text.ts";
import { quantizeCheckpoint } from "./checkpoint.ts";
import { parseFormat } from "./format.ts";
import type { TuneRates } from "./gpu/tuned_layer.ts";
import { directorySink, requireSpace, workDirectory } from "./directory.ts";
import { planTensors } from "./output.ts";
import { describePlan, planQuantization } from "./plan.ts";
import { duration, progressLines } from "./progress.ts";
import { readTokenFile } from "./token_file.ts";

const COMMAND = {
  command: "quantize",
  summary: "Turns a float checkpoint of a Llama-family model into one of CodeGEMM format.",
  flags: {
    in: { type: "path", required: true, help: "directory of the float checkpoint" },
    out: {
      type: "path",
      required: true,
      help: "directory to make; one where a run stopped half way is gone on with",
    },
    format: {
      type: "string",
      default: "m1v4g128",
      help: "mXvYgZ: X codebooks, Y weights per code, Z weights per scale",
    },
    calibration: {
      type: "path",
      help: "token ids to calibrate on (.u16, .u32, or JSON {tokens}); without, plain k-means",
    },
    keep: {
      type: "string",
      default: "",
      help: "matrices that stay float16, by parts of their names: mlp.down_proj,layers.0",
    },
    fallback: {
      type: "string",
      help: "float16: keeps matrices whose shape the format does not suit",
    },
    sequence: { type: "integer", default: 512, min: 4, help: "tokens of a calibration sequence" },
    batch: { type: "integer", default: 16, min: 1, help: "sequences on the GPU at a time" },
    "block-sequences": {
      type: "integer",
      default: 64,
      min: 1,
      help: "sequences that blocks are fitted and tuned on; for models that are too large to be " +
        "tuned whole 128, with --batch 4 --fit-rounds 2 --block-steps 32 --model-steps 0",
    },
    "fit-rounds": {
      type: "integer",
      default: 3,
      min: 0,
      max: 100,
      help: "rounds of code search and codebook steps for each matrix",
    },
    "fit-steps": { type: "integer", default: 50, min: 0, help: "codebook steps of each round" },
    "block-steps": { type: "integer", default: 16, min: 0, help: "tuning steps of each block" },
    "model-steps": {
      type: "integer",
      default: 256,
      min: 0,
      help: "tuning steps of the whole model; 0 for models that do not fit the GPU in float32",
    },
    "code-rate": {
      type: "number",
      default: 0.06,
      min: 0,
      help: "how far a step of model tuning moves what codes follow, as a part of the layer's " +
        "quantization error; 0 leaves the codes alone",
    },
    "model-rate": {
      type: "number",
      default: 1,
      min: 0,
      max: 100,
      help: "factor of all rates of model tuning, which follow each layer's quantization error",
    },
    "next-token-share": {
      type: "number",
      default: 0,
      min: 0,
      max: 1,
      help:
        "of the next token in model tuning's loss; the rest is the float model's distribution. " +
        "Above 0 the model goes on learning from the calibration text, away from the float model",
    },
    rounds: {
      type: "integer",
      default: 12,
      min: 0,
      max: 1000,
      help: "without calibration: training rounds over all codebooks of a matrix",
    },
    samples: {
      type: "integer",
      default: 2 ** 17,
      min: 256,
      max: 2 ** 24,
      help: "without calibration: vectors of a matrix that its codebooks are trained on",
    },
    seed: { type: "integer", default: 1, min: 0, max: 2 ** 31, help: "of every random choice" },
    "shard-size": {
      type: "bytes",
      default: 4 * 2 ** 30,
      min: 2 ** 20,
      help: "tensor bytes per file",
    },
    memory: {
      type: "bytes",
      default: 16 * 2 ** 30,
      min: 2 ** 20,
      help: "GPU memory to use; model tuning is left out where it takes more",
    },
    verbose: { type: "boolean", help: "tell what each part of a block took, as it ends" },
    "dry-run": { type: "boolean", help: "only say what it would take: sizes, memory, time" },
    software: { type: "boolean", help: "calibrate on the CPU where there is no GPU" },
  },
} as const;

type Flags = ReturnType<typeof parseFlags<typeof COMMAND.flags>>["values"];

/** Rates of model tuning, as parts of each layer's quantization error. */
const RATES = { codebooks: 0.009, scales: 0.009, norms: 0.003 };
/** Groups of each matrix that a block's first codebooks are trained on: enough for 256 centroids. */
const SAMPLE_WEIGHTS = 2 ** 13;

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  const format = parseFormat(values.format);
  if (values.fallback !== undefined && values.fallback !== "float16") {
    throw new FleetError("bad-usage", `--fallback takes float16, not ${values.fallback}`);
  }
  if (values["dry-run"]) return await dryRun(values);
  console.error(
    `Quantizing ${values.in} to ${values.format}: ${bitsPerWeight(format)} bits per weight`,
  );
  const seconds = values.calibration
    ? await calibrated(values, values.calibration)
    : await plain(values);
  // What was written is read back as any reader would: headers, shapes, config.
  await openCheckpoint(directorySource(values.out));
  console.error(`${values.out} is done, in ${duration(seconds)}`);
}

function common(values: Flags) {
  return {
    seed: values.seed,
    keep: values.keep.split(",").map((part) => part.trim()).filter(Boolean),
    ...(values.fallback ? { fallback: "float16" as const } : {}),
    maxShardBytes: values["shard-size"],
  };
}

const progress = ({ verbose }: Flags) =>
  progressLines(systemClock, (line) => console.error(line), { parts: verbose });

const gib = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;

async function plain(values: Flags): Promise<number> {
  const checkpoint = await openCheckpoint(directorySource(values.in));
  const format = parseFormat(values.format), { keep, fallback } = common(values);
  const tensors = planTensors(checkpoint, format, keep, fallback).flatMap((item) => item.tensors);
  const sink = await directorySink(values.out);
  await requireSpace(values.out, tensors.reduce((sum, { bytes }) => sum + bytes, 0));
  const report = await quantizeCheckpoint(
    checkpoint,
    format,
    { rounds: values.rounds, sampleVectors: values.samples, ...common(values) },
    sink,
    {
      clock: systemClock,
      onCheck: progress(values).onCheck,
      onMatrix({ name, relativeError, seconds }, done, total) {
        const error = (100 * relativeError).toFixed(2);
        console.error(`${done}/${total} ${name}: error ${error} %, ${seconds.toFixed(1)} s`);
      },
    },
  );
  return report.seconds;
}

/** What a calibrated run is made from. */
async function prepare(values: Flags, path: string) {
  const checkpoint = await openCheckpoint(directorySource(values.in));
  const format = parseFormat(values.format), { contextTokens } = checkpoint.config;
  if (values.sequence > contextTokens) {
    throw new FleetError(
      "bad-usage",
      `--sequence ${values.sequence} is longer than the model's context of ${contextTokens} tokens`,
    );
  }
  const text = cutSequences(
    await readTokenFile(path),
    values.sequence,
    values.batch,
    checkpoint.config.vocabSize,
  );
  const settings: CalibratedSettings = {
    fitRounds: values["fit-rounds"],
    fitSteps: values["fit-steps"],
    blockSteps: values["block-steps"],
    sampleGroups: Math.max(1, Math.ceil(SAMPLE_WEIGHTS / format.g)),
    modelSteps: values["model-steps"],
    rates: modelRates(values),
    nextTokenShare: values["next-token-share"],
    batchSequences: values.batch,
    blockSequences: values["block-sequences"],
    ...common(values),
  };
  const plan = () => planQuantization(checkpoint, format, settings, text);
  if (plan().modelGpuBytes > values.memory) {
    console.error(
      `Tuning the whole model would take ${gib(plan().modelGpuBytes)} of GPU memory, --memory ` +
        `allows ${gib(values.memory)}: only its blocks are tuned`,
    );
    settings.modelSteps = 0;
  }
  return { checkpoint, format, text, settings, plan };
}

/** Rates of model tuning, {@linkcode RATES} and the codes', times what was asked. */
function modelRates(values: Flags): TuneRates {
  const by = values["model-rate"];
  return {
    codebooks: by * RATES.codebooks,
    scales: by * RATES.scales,
    norms: by * RATES.norms,
    codes: by * values["code-rate"],
  };
}

async function dryRun(values: Flags): Promise<void> {
  if (!values.calibration) {
    throw new FleetError("bad-usage", "--dry-run plans calibrated runs; name --calibration");
  }
  const { plan } = await prepare(values, values.calibration);
  console.log(describePlan(plan()));
}

async function calibrated(values: Flags, path: string): Promise<number> {
  const { checkpoint, format, text, settings, plan } = await prepare(values, path);
  const gpu = await Gpu.open({ software: values.software });
  try {
    const { blockGpuBytes, workBytes, outputBytes } = plan();
    if (blockGpuBytes > values.memory) {
      throw new FleetError(
        "out-of-memory",
        `A block takes ${gib(blockGpuBytes)} of GPU memory, --memory allows ` +
          `${gib(values.memory)}; lower --batch or --sequence, or raise --memory`,
      );
    }
    const files = await workDirectory(values.out);
    await requireSpace(values.out, workBytes + outputBytes);
    const report = await quantizeCalibrated(checkpoint, format, text, settings, {
      gpu,
      clock: systemClock,
      ...files,
      ...progress(values),
    });
    return report.seconds;
  } finally {
    gpu.close();
  }
}

if (import.meta.main) await runCommand(main);
