/**
 * A worker's stage with synthetic random weights made on the GPU: decode and prefill speed of a model
 * that need not exist, and where the time of a step goes.
 *
 *     deno task bench model --shape llama-3-70b --layers 20 --batch 1,8 --context 1024 --prompt 512
 *
 * @module
 */
import { Gpu } from "../kernels/gpu.ts";
import { StageModel, type StageSpec, tuneStage, WeightStore } from "../model/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { GREEDY, type StepBatch } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import { type CodeGemmFormat, type ModelConfig, stageParts } from "../shared/model_config.ts";
import { type KernelTime, timeKernels } from "./kernel_times.ts";
import { syntheticMatrices, syntheticTensors } from "./synthetic_model.ts";

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

const FORMATS: Record<string, CodeGemmFormat | null> = {
  dense: null,
  m1v4g128: { m: 1, v: 4, g: 128, b: 8 },
  m2v8g128: { m: 2, v: 8, g: 128, b: 8 },
};

/** Steps before the measured ones: drivers compile at first use, clocks rise under load. */
const WARM_UP_STEPS = 12;

/** What one kind of step took; times in ms, medians over the measured steps. */
interface Measurement {
  kind: "decode" | "prefill";
  rows: number;
  /** Positions before the step. */
  context: number;
  /** Wall time from one step's end to the next one's. */
  stepMs: number;
  tokensPerSecond: number;
  gpuMs: number;
  /** CPU time of checking, writing and encoding a step, up to its submit. */
  encodeMs: number;
  readbackMs: number;
  /** Wall time in which the GPU had nothing to do: `stepMs - gpuMs`. */
  idleMs: number;
}

class Bench {
  readonly #model: StageModel;
  readonly #spec: StageSpec;
  readonly #pagesPerSequence: number;

  constructor(model: StageModel, spec: StageSpec) {
    this.#model = model;
    this.#spec = spec;
    this.#pagesPerSequence = Math.ceil(spec.limits.contextTokens / LIMITS.pageTokens);
  }

  /** One row of each of `rows` sequences at `position`, as decoding brings them. */
  decodeBatch(rows: number, position: number): StepBatch {
    return {
      sequences: Array.from({ length: rows }, (_, s) => ({ pages: this.#pagesOf(s) })),
      rowSequence: Uint16Array.from({ length: rows }, (_, row) => row),
      rowPosition: new Uint32Array(rows).fill(position),
      rowToken: Uint32Array.from({ length: rows }, (_, row) => row),
      decodeRows: rows,
      requests: this.#spec.last ? Array.from({ length: rows }, (_, row) => greedy(row)) : [],
    };
  }

  /** `rows` rows of a prompt from `from` on. */
  prefillBatch(rows: number, from: number): StepBatch {
    return {
      sequences: [{ pages: this.#pagesOf(0) }],
      rowSequence: new Uint16Array(rows),
      rowPosition: Uint32Array.from({ length: rows }, (_, i) => from + i),
      rowToken: Uint32Array.from({ length: rows }, (_, i) => i),
      decodeRows: 0,
      requests: this.#spec.last ? [greedy(rows - 1)] : [],
    };
  }

  /** Each step waits for the one before it, as decoding does. */
  async measure(
    kind: Measurement["kind"],
    context: number,
    steps: number,
    batchOf: (step: number) => StepBatch,
  ): Promise<Measurement> {
    const samples: { stepMs: number; gpuMs: number; encodeMs: number; readbackMs: number }[] = [];
    const { hiddenSize } = this.#spec.config;
    const rows = batchOf(0).rowToken.length;
    const hidden = this.#spec.first ? null : new Uint16Array(rows * hiddenSize).fill(0x3400);
    let endedMs = performance.now();
    const warmUp = kind === "decode" ? WARM_UP_STEPS : 1;
    for (let step = 0; step < warmUp + steps; step++) {
      const batch = batchOf(step);
      const beganMs = performance.now();
      const ticket = this.#model.submit(batch, hidden);
      const submittedMs = performance.now();
      const output = await this.#model.finish(ticket);
      const nowMs = performance.now();
      samples.push({
        stepMs: nowMs - endedMs,
        gpuMs: output.gpuMs,
        encodeMs: submittedMs - beganMs,
        readbackMs: output.readbackMs,
      });
      endedMs = nowMs;
    }
    const measured = samples.slice(warmUp);
    const middle = (of: (sample: typeof samples[number]) => number) => median(measured.map(of));
    const stepMs = middle((sample) => sample.stepMs);
    return {
      kind,
      rows,
      context,
      stepMs,
      tokensPerSecond: rows / stepMs * 1000,
      gpuMs: middle((sample) => sample.gpuMs),
      encodeMs: middle((sample) => sample.encodeMs),
      readbackMs: middle((sample) => sample.readbackMs),
      idleMs: middle((sample) => sample.stepMs - sample.gpuMs),
    };
  }

  /** What each kernel of a decode step takes. */
  async profile(gpu: Gpu, rows: number, context: number): Promise<KernelTime[]> {
    const hidden = this.#spec.first
      ? null
      : new Uint16Array(rows * this.#spec.config.hiddenSize).fill(0x3400);
    return await timeKernels(gpu, async () => {
      await this.#model.finish(this.#model.submit(this.decodeBatch(rows, context), hidden));
    });
  }

  #pagesOf(sequence: number): Uint32Array {
    const each = this.#pagesPerSequence;
    return Uint32Array.from({ length: each }, (_, i) => sequence * each + i);
  }
}

function greedy(row: number): StepBatch["requests"][number] {
  return { type: "sample", row, sampling: GREEDY };
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
  return [
    m.kind.padEnd(8),
    String(m.rows).padStart(4),
    String(m.context).padStart(8),
    m.stepMs.toFixed(2).padStart(9),
    m.tokensPerSecond.toFixed(1).padStart(10),
    m.gpuMs.toFixed(2).padStart(9),
    m.encodeMs.toFixed(2).padStart(7),
    m.readbackMs.toFixed(2).padStart(9),
    m.idleMs.toFixed(2).padStart(9),
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
      format: { type: "string", default: "m1v4g128", help: Object.keys(FORMATS).join(", ") },
      decode: { type: "string", default: "codegemm", help: "codegemm or dequantize" },
      batch: { type: "string", default: "1,8,32", help: "sequences that decode together" },
      context: { type: "integer", default: 1024, min: 1, help: "positions before a decode step" },
      prompt: { type: "integer", default: 512, min: 0, help: "rows of a prefill step; 0 for none" },
      steps: { type: "integer", default: 24, min: 1, help: "measured decode steps" },
      tune: { type: "boolean", help: "choose kernel variants first, as a worker does" },
      kernels: { type: "boolean", help: "also time each kernel of a decode step by itself" },
      software: { type: "boolean", help: "run on the CPU where there is no GPU" },
      out: { type: "path", help: "a file for the figures as JSON" },
    },
  });
  const shape = choose("shape", SHAPES, values.shape);
  const codegemm = choose("format", FORMATS, values.format);
  const families = { codegemm: "codegemm", dequantize: "dequantize" } as const;
  const batches = integers("batch", values.batch);
  const layers = values.layers ?? shape.layers;
  const ends = values.ends === undefined ? layers === shape.layers : values.ends === "yes";
  const config = { ...shape, layers, codegemm };
  const most = Math.max(...batches);
  const contextTokens = Math.max(
    values.context + WARM_UP_STEPS + values.steps + 1,
    values.prompt,
  );
  const spec: StageSpec = {
    config,
    from: 0,
    to: layers,
    first: ends,
    last: ends,
    limits: {
      maxRows: Math.max(most, values.prompt),
      maxSequences: most,
      maxOutputs: most,
      pages: most * Math.ceil(contextTokens / LIMITS.pageTokens),
      contextTokens,
    },
    profile: { version: 1, decode: choose("decode", families, values.decode) },
  };

  const gpu = await Gpu.open({ software: values.software });
  const store = new WeightStore(gpu);
  const loadingMs = performance.now();
  for (const part of stageParts(spec)) {
    await store.load(config, part, syntheticTensors(config), part, syntheticMatrices(gpu));
  }
  const tuning: string[] = [];
  const variants = values.tune
    ? await tuneStage(gpu, spec, store, {
      read: () => Promise.resolve(tuning.at(-1) ?? null),
      write: (text) => Promise.resolve(void tuning.push(text)),
    })
    : undefined;
  for (const text of tuning) console.log(`tuned: ${text}`);
  const model = await StageModel.load(gpu, { ...spec, variants }, store);
  const loadSeconds = (performance.now() - loadingMs) / 1000;
  console.log(
    `${gpu.info.name}: ${values.shape}, ${layers} layers${ends ? ", embedding and head" : ""}, ` +
      `${values.format}, ${values.decode}, ${(model.memoryBytes / 2 ** 30).toFixed(1)} GiB, ` +
      `loaded in ${loadSeconds.toFixed(1)} s`,
  );
  console.log(HEADER);
  const bench = new Bench(model, spec);
  const measurements: Measurement[] = [];
  const kernels: Record<number, KernelTime[]> = {};
  const take = (measurement: Measurement) => {
    measurements.push(measurement);
    console.log(line(measurement));
  };
  for (const rows of batches) {
    const { context, steps } = values;
    take(
      await bench.measure("decode", context, steps, (i) => bench.decodeBatch(rows, context + i)),
    );
  }
  for (const rows of values.kernels ? batches : []) {
    kernels[rows] = await bench.profile(gpu, rows, values.context);
    console.log(`\n${rows} decode rows, by kernel:        us  dispatches`);
    for (const { kernel, microseconds, dispatches } of kernels[rows]) {
      console.log(
        `${kernel.padEnd(40)} ${microseconds.toFixed(1).padStart(9)} ${dispatches}`,
      );
    }
  }
  if (values.prompt > 0) {
    take(await bench.measure("prefill", 0, 3, () => bench.prefillBatch(values.prompt, 0)));
  }
  if (values.out !== undefined) {
    const report = { adapter: gpu.info, settings: values, loadSeconds, measurements, kernels };
    await Deno.writeTextFile(values.out, JSON.stringify(report, null, 2) + "\n");
  }
  model.destroy();
  gpu.close();
}

if (import.meta.main) await runCommand(main);
