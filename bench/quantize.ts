/**
 * How long a layer of a real shape takes to quantize, and how much memory: random weights on disk,
 * random calibration text, and the quantize command itself in a process of its own.
 *
 * What is timed is the whole way of a layer, at the setting that `quantize --help` names for models that
 * are too large to be tuned whole. A model is as many of them; its embedding and its output head are not
 * in it.
 *
 * @module
 */
import denoJson from "../deno.json" with { type: "json" };
import { startChild, taskArgs } from "../cli/processes.ts";
import {
  type CalibratedReport,
  type GpuPhase,
  parseFormat,
  PHASES,
  planQuantization,
  type QuantizationPlan,
} from "../quantize/mod.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { randomInt, seededRandom } from "../shared/random.ts";
import { type ShapeName, SHAPES, writeSyntheticCheckpoint } from "./synthetic_checkpoint.ts";

const ROOT = new URL("../", import.meta.url);
/** Tokens of the vocabulary: embedding and output head are not what is measured. */
const VOCABULARY = 1024;
const SAMPLE_MS = 500;

const COMMAND = {
  command: "bench quantize",
  summary:
    "Time and memory of quantizing a layer with calibration, and what that makes of a model.",
  flags: {
    shape: { type: "string", default: "llama-3-70b", help: Object.keys(SHAPES).join(", ") },
    layers: { type: "integer", default: 1, min: 1, max: 4, help: "layers to quantize" },
    format: { type: "string", default: "m1v4g128", help: "mXvYgZ" },
    samples: { type: "integer", default: 128, min: 1, help: "calibration sequences" },
    sequence: { type: "integer", default: 512, min: 4, help: "tokens of a sequence" },
    batch: { type: "integer", default: 4, min: 1, help: "sequences on the GPU at a time" },
    "fit-rounds": { type: "integer", default: 2, min: 0, help: "as quantize takes it" },
    "fit-steps": { type: "integer", default: 50, min: 0, help: "as quantize takes it" },
    "block-steps": { type: "integer", default: 32, min: 0, help: "as quantize takes it" },
    memory: { type: "string", default: "23GiB", help: "GPU memory, as quantize takes it" },
    directory: { type: "path", help: "where to write weights and work files; default: temporary" },
    software: { type: "boolean", help: "on a software adapter" },
    out: { type: "path", help: "a file for the figures as JSON" },
  },
} as const;

type Values = ReturnType<typeof parseFlags<typeof COMMAND.flags>>["values"];

/** Memory at its most while the process ran. */
interface Peaks {
  ramBytes: number | null;
  /** Of all processes on the first GPU, by nvidia-smi, less what was in use before. */
  gpuBytes: number | null;
}

/** Runs the quantize command; its lines come through as they are printed. */
async function quantize(args: string[]): Promise<Peaks> {
  const before = await gpuBytesInUse();
  const child = startChild({
    name: "quantize",
    command: Deno.execPath(),
    args: [...taskArgs(denoJson.tasks, "quantize"), ...args],
    cwd: ROOT.pathname,
    onLine: (_, line) => console.log(line),
  });
  const peaks: Peaks = { ramBytes: null, gpuBytes: null };
  const sample = async () => {
    const [ram, used] = await Promise.all([peakRam(child.pid), gpuBytesInUse()]);
    if (ram !== null) peaks.ramBytes = Math.max(peaks.ramBytes ?? 0, ram);
    if (used !== null && before !== null) {
      peaks.gpuBytes = Math.max(peaks.gpuBytes ?? 0, used - before);
    }
  };
  let running = true;
  const ended = child.ended.finally(() => running = false);
  try {
    while (running) {
      await sample();
      await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, SAMPLE_MS))]);
    }
    const { code } = await ended;
    if (code !== 0) throw new FleetError("internal", `quantize ended with ${code}`);
  } finally {
    await child.stop();
  }
  return peaks;
}

/** What a program prints, or null where it is not there or fails. */
async function outputOf(command: string, args: string[]): Promise<string | null> {
  try {
    const { success, stdout } = await new Deno.Command(command, { args, stderr: "null" }).output();
    return success ? new TextDecoder().decode(stdout) : null;
  } catch {
    return null;
  }
}

/** The most memory that a process had, where /proc tells. */
async function peakRam(pid: number): Promise<number | null> {
  const line = await outputOf("grep", ["VmHWM", `/proc/${pid}/status`]);
  const kib = line && /(\d+) kB/.exec(line)?.[1];
  return kib ? Number(kib) * 1024 : null;
}

async function gpuBytesInUse(): Promise<number | null> {
  const flags = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"];
  const mib = Number((await outputOf("nvidia-smi", flags))?.split("\n")[0] || NaN);
  return Number.isFinite(mib) ? mib * 2 ** 20 : null;
}

/** The flags of the quantize command. */
function flagsOf(values: Values, path: string): string[] {
  return [
    ...["--in", `${path}/float`, "--out", `${path}/quantized`, "--format", values.format],
    ...["--calibration", `${path}/tokens.u16`, "--sequence", String(values.sequence)],
    ...["--batch", String(values.batch), "--block-sequences", String(values.samples)],
    ...["fit-rounds", "fit-steps", "block-steps"].flatMap((name) => [
      `--${name}`,
      String(values[name as "fit-rounds" | "fit-steps" | "block-steps"]),
    ]),
    ...["--model-steps", "0", "--memory", values.memory],
    ...(values.software ? ["--software"] : []),
  ];
}

/** Float weights and calibration text. */
async function prepare(values: Values, path: string): Promise<void> {
  await Deno.mkdir(`${path}/float`);
  const bytes = await writeSyntheticCheckpoint(`${path}/float`, {
    shape: values.shape as ShapeName,
    layers: values.layers,
    format: null,
    contextTokens: values.sequence,
    vocab: VOCABULARY,
  });
  const random = seededRandom(1);
  const tokens = Uint16Array.from(
    { length: values.samples * values.sequence },
    () => randomInt(random, VOCABULARY),
  );
  await Deno.writeFile(`${path}/tokens.u16`, new Uint8Array(tokens.buffer));
  console.log(
    `${values.shape}, ${values.layers} of its layers: ${gib(bytes)} of float16 weights, ` +
      `${tokens.length} tokens to calibrate on`,
  );
}

const gib = (bytes: number | null) =>
  bytes === null ? "unknown" : `${(bytes / 2 ** 30).toFixed(2)} GiB`;

/** Seconds of a layer, phase by phase, with what happens once for each layer of a model. */
function layerSeconds(report: CalibratedReport): Record<string, number> {
  const { blocks, checkSeconds, writeSeconds } = report;
  const mean = (phase: typeof PHASES[number]) =>
    blocks.reduce((sum, { phases }) => sum + phases[phase], 0) / blocks.length;
  return {
    check: checkSeconds / blocks.length,
    ...Object.fromEntries(PHASES.map((phase) => [phase, mean(phase)])),
    "write checkpoint": writeSeconds / blocks.length,
  };
}

const MEANINGS: Record<string, string> = {
  check: "all weights read and looked through, before the first block",
  read: "float weights from disk, and to the GPU",
  capture: "float layer over the text, twice; Hessians",
  codes: "code search",
  codebooks: "steps of codebooks and scales",
  tuning: "steps of the whole block",
  outputs: "quantized layer over the text",
  write: "the finished block kept on disk",
  "write checkpoint": "the finished block into the checkpoint",
};

function print(
  values: Values,
  report: CalibratedReport,
  plan: QuantizationPlan,
  seconds: Record<string, number>,
  peaks: Peaks,
): number {
  console.log(`\n${report.adapter}, ${values.shape}, ${values.format}, seconds of a layer`);
  console.log("phase                seconds     TFLOP   TFLOP/s");
  for (const [phase, took] of Object.entries(seconds)) {
    const operations = (plan.operations[phase as GpuPhase] ?? 0) / values.layers / 1e12;
    const work = operations === 0 ? "" : operations.toFixed(1);
    const rate = operations === 0 || took === 0 ? "" : (operations / took).toFixed(2);
    console.log(
      `${phase.padEnd(18)}${took.toFixed(2).padStart(10)}${work.padStart(10)}${rate.padStart(10)}` +
        `   ${MEANINGS[phase]}`,
    );
  }
  const layer = Object.values(seconds).reduce((sum, took) => sum + took, 0);
  const { layers } = SHAPES[values.shape as ShapeName];
  const hours = layer * layers / 3600;
  console.log(
    `layer             ${layer.toFixed(2).padStart(10)}   x ${layers} = ${hours.toFixed(2)} hours`,
  );
  console.log(`\nmain memory       ${gib(peaks.ramBytes)} at most, planned ${gib(plan.ramBytes)}`);
  console.log(
    `GPU memory        ${gib(report.gpuPeakBytes)} of buffers at most, ${gib(peaks.gpuBytes)} by ` +
      `nvidia-smi, planned ${gib(plan.blockGpuBytes)}`,
  );
  return hours;
}

async function measure(values: Values, path: string): Promise<void> {
  await prepare(values, path);
  const flags = flagsOf(values, path);
  console.log(`deno task quantize ${flags.join(" ")} --dry-run`);
  await quantize([...flags, "--dry-run"]);
  console.log();
  const peaks = await quantize([...flags, "--verbose"]);
  const report: CalibratedReport = JSON.parse(
    await Deno.readTextFile(`${path}/quantized/quantization.json`),
  );
  const plan = planQuantization(
    await openCheckpoint(directorySource(`${path}/float`)),
    parseFormat(values.format),
    report.settings,
    { tokens: values.sequence, sequences: values.samples },
  );
  const seconds = layerSeconds(report);
  const hours = print(values, report, plan, seconds, peaks);
  if (values.out) {
    const figures = { values, adapter: report.adapter, seconds, hours, peaks, plan, report };
    await Deno.writeTextFile(values.out, JSON.stringify(figures, null, 2) + "\n");
  }
}

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  if (!(values.shape in SHAPES)) {
    throw new FleetError("bad-usage", `--shape takes ${Object.keys(SHAPES).join(", ")}`);
  }
  const path = await Deno.makeTempDir({
    dir: values.directory,
    prefix: "codegemm-fleet-bench-",
  });
  try {
    await measure(values, path);
  } finally {
    await Deno.remove(path, { recursive: true });
  }
}

if (import.meta.main) await runCommand(main);
