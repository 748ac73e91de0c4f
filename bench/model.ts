/**
 * A worker's stage with synthetic random weights made on the GPU: decode and prefill speed of a model
 * that need not exist, and where the time of a step goes.
 *
 *     deno task bench model --shape llama-3-70b --layers 20 --batch 1,8 --context 1024 --prompt 512
 *
 * Decoding is measured in three ways:
 * - `decode`: each step waits for the one before it, as the tokens of a sequence do, on the GPU's own
 *   thread and without frames;
 * - `alone`: the same as a fleet drives it, frames in and frames out, across threads; one step in
 *   flight;
 * - `busy`: two steps in flight, of two microbatches: what a stage does whose pipeline is full.
 *
 * `idle` is what the GPU's own clock says between the end of a step and the beginning of the next one.
 *
 * @module
 */
import type { StageSpec } from "../model/mod.ts";
import { parseFormatName } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { LIMITS } from "../shared/limits.ts";
import { fastestDecode } from "../shared/protocol.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import { frameRunner } from "../worker/step_crossing.ts";
import { Thread } from "../worker/thread.ts";
import type { KernelTime } from "./kernel_times.ts";
import { type ModelCalls, type StepSample, WARM_UP_STEPS } from "./model_calls.ts";
import { stageLimits } from "./stage_batches.ts";
import { StageDrive } from "./stage_drive.ts";

const LLAMA_3 = {
  vocabSize: 128256,
  headDim: 128,
  kvHeads: 8,
  contextTokens: 8192,
  rmsNormEps: 1e-5,
  ropeTheta: 500_000,
  ropeScaling: null,
  tiedEmbeddings: false,
  bosToken: 128000,
  eosTokens: [128001],
};

/** Models by the name of their shape. */
const SHAPES: Record<string, Omit<ModelConfig, "codegemm">> = {
  "llama-3-70b": { ...LLAMA_3, hiddenSize: 8192, layers: 80, heads: 64, ffnSize: 28672 },
  "llama-3-8b": { ...LLAMA_3, hiddenSize: 4096, layers: 32, heads: 32, ffnSize: 14336 },
  /** For trying the benchmark itself on a software adapter. */
  tiny: {
    ...LLAMA_3,
    vocabSize: 4000,
    hiddenSize: 512,
    layers: 2,
    heads: 8,
    kvHeads: 4,
    headDim: 64,
    ffnSize: 1024,
  },
};

/** What one kind of step took; times in ms, medians over the measured steps. */
interface Measurement extends StepSample {
  kind: "decode" | "alone" | "busy" | "prefill";
  rows: number;
  /** Positions before the step. */
  context: number;
  /** Of all rows of the steps that follow each other: with steps of `stepMs`. */
  tokensPerSecond: number;
}

function summary(
  kind: Measurement["kind"],
  rows: number,
  context: number,
  samples: StepSample[],
): Measurement {
  const middle = (of: (sample: StepSample) => number) => median(samples.map(of));
  const middleOrNull = (of: (sample: StepSample) => number | null) =>
    samples.some((sample) => of(sample) === null) ? null : middle((sample) => of(sample)!);
  const stepMs = middle((sample) => sample.stepMs);
  return {
    kind,
    rows,
    context,
    stepMs,
    tokensPerSecond: rows / stepMs * 1000,
    gpuMs: middle((sample) => sample.gpuMs),
    encodeMs: middleOrNull((sample) => sample.encodeMs),
    readbackMs: middle((sample) => sample.readbackMs),
    idleMs: middleOrNull((sample) => sample.idleMs),
  };
}

function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[sorted.length >> 1];
}

function integers(flag: string, text: string): number[] {
  return text.split(",").map((word) => {
    const value = Number(word);
    if (Number.isInteger(value) && value > 0) return value;
    throw new FleetError("bad-usage", `--${flag} takes positive integers, not ${word}`);
  });
}

function choose<T>(flag: string, choices: Record<string, T>, name: string): T {
  if (name in choices) return choices[name];
  const names = Object.keys(choices).join(", ");
  throw new FleetError("bad-usage", `--${flag} takes one of ${names}; not ${name}`);
}

const HEADER = "kind     rows  context   step ms   tokens/s    GPU ms  encode  readback   idle ms";

function line(m: Measurement): string {
  const figure = (value: number | null) => value === null ? "-" : value.toFixed(2);
  return [
    m.kind.padEnd(8),
    String(m.rows).padStart(4),
    String(m.context).padStart(8),
    m.stepMs.toFixed(2).padStart(9),
    m.tokensPerSecond.toFixed(1).padStart(10),
    m.gpuMs.toFixed(2).padStart(9),
    figure(m.encodeMs).padStart(7),
    m.readbackMs.toFixed(2).padStart(9),
    (m.idleMs?.toFixed(3) ?? "-").padStart(9),
  ].join(" ");
}

async function main(): Promise<void> {
  const { values } = parseFlags({
    command: "bench model",
    summary: "Times a stage of a synthetic model.",
    flags: {
      shape: { type: "string", default: "llama-3-70b", help: Object.keys(SHAPES).join(", ") },
      layers: { type: "integer", min: 1, help: "layers of the stage (all)" },
      ends: { type: "string", help: "with embedding and output head: yes or no (with all layers)" },
      format: {
        type: "string",
        default: "m1v4g128",
        help: "dense, m1v4g128, m1v8b16 (AQLM's 1x16), ...",
      },
      decode: {
        type: "string",
        default: "auto",
        help: "codegemm, dequantize, or auto, as a coordinator takes it",
      },
      batch: { type: "string", default: "1,8,32", help: "sequences that decode together" },
      context: { type: "integer", default: 1024, min: 1, help: "positions before a decode step" },
      prompt: { type: "integer", default: 512, min: 0, help: "rows of a prefill step; 0 for none" },
      steps: { type: "integer", default: 24, min: 1, help: "measured decode steps" },
      wire: {
        type: "number",
        default: 0.5,
        min: 0,
        help: "alone and busy: from output to input, ms",
      },
      tune: { type: "boolean", help: "choose kernel variants first, as a worker does" },
      kernels: { type: "boolean", help: "also time each kernel of a decode step by itself" },
      software: { type: "boolean", help: "run on the CPU where there is no GPU" },
      out: { type: "path", help: "a file for the figures as JSON" },
    },
  });
  const shape = choose("shape", SHAPES, values.shape);
  const codegemm = values.format === "dense" ? null : parseFormatName(values.format);
  if (codegemm === null && values.format !== "dense") {
    throw new FleetError("bad-usage", `--format takes dense or m1v4g128, not ${values.format}`);
  }
  const auto = fastestDecode(codegemm);
  const families = { auto, codegemm: "codegemm", dequantize: "dequantize", int8: "int8" } as const;
  const decode = choose("decode", families, values.decode);
  const batches = integers("batch", values.batch);
  const layers = values.layers ?? shape.layers;
  const ends = values.ends === undefined ? layers === shape.layers : values.ends === "yes";
  const config = { ...shape, layers, codegemm };
  const { context, steps, prompt, wire: wireMs } = values;
  const contextTokens = Math.max(context + WARM_UP_STEPS + steps + 1, prompt);
  const spec: StageSpec = {
    config,
    from: 0,
    to: layers,
    first: ends,
    last: ends,
    limits: stageLimits(Math.max(...batches), contextTokens, prompt),
    profile: { version: 1, decode },
  };

  const thread = new Thread<ModelCalls>(new URL("./model_thread.ts", import.meta.url), "GPU");
  const args = { spec, software: values.software, tune: values.tune };
  const { adapter, memoryBytes, loadSeconds } = await thread.call("load", args, {
    onNote: (text) => console.log(text),
  });
  console.log(
    `${adapter}: ${values.shape}, ${layers} layers${ends ? ", embedding and head" : ""}, ` +
      `${values.format}, ${decode}, ${(memoryBytes / 2 ** 30).toFixed(1)} GiB, ` +
      `loaded in ${loadSeconds.toFixed(1)} s`,
  );
  const drive = new StageDrive(
    spec,
    frameRunner((frame) => thread.call("run", { frame }, { transfer: [frame.buffer] })),
  );
  console.log(HEADER);
  const measurements: Measurement[] = [];
  const take = (kind: Measurement["kind"], rows: number, at: number, samples: StepSample[]) => {
    measurements.push(summary(kind, rows, at, samples));
    console.log(line(measurements.at(-1)!));
  };
  for (const rows of batches) {
    const how = { rows, context, steps };
    take("decode", rows, context, await thread.call("direct", { kind: "decode", ...how }));
    take("alone", rows, context, await drive.measure({ ...how, wireMs, inFlight: 1 }));
    const inFlight = LIMITS.maxStepsInFlightPerStage;
    take("busy", rows, context, await drive.measure({ ...how, wireMs, inFlight }));
  }
  if (prompt > 0) {
    const how = { kind: "prefill", rows: prompt, context: 0, steps: 3 } as const;
    take("prefill", prompt, 0, await thread.call("direct", how));
  }
  const kernels: Record<number, KernelTime[]> = {};
  for (const rows of values.kernels ? batches : []) {
    kernels[rows] = await thread.call("profile", { rows, context });
    console.log(`\n${rows} decode rows, by kernel:        us  dispatches`);
    for (const { kernel, microseconds, dispatches } of kernels[rows]) {
      console.log(
        `${kernel.padEnd(40)} ${microseconds.toFixed(1).padStart(9)} ${dispatches}`,
      );
    }
  }
  if (values.out !== undefined) {
    const report = { adapter, settings: values, loadSeconds, measurements, kernels };
    await Deno.writeTextFile(values.out, JSON.stringify(report, null, 2) + "\n");
  }
  // The thread ends with the process: one with a GPU that ends before may take the process along.
  Deno.exit(0);
}

if (import.meta.main) await runCommand(main);
