/**
 * What a quantization with calibration will take, before it begins: sizes, memory, time.
 *
 * @module
 */
import type { Checkpoint } from "../shared/checkpoint/mod.ts";
import {
  type CodeGemmFormat,
  LINEAR_NAMES,
  linearShape,
  type ModelConfig,
} from "../shared/model_config.ts";
import type { CalibratedSettings } from "./calibrated.ts";
import { blockBatches } from "./calibration_text.ts";
import { gradientChunks } from "./gpu/coded_matrix.ts";
import { BLOCK_INPUTS, type BlockInput } from "./gpu/forward.ts";
import { planTensors } from "./output.ts";
import type { Phase } from "./phases.ts";
import { duration } from "./progress.ts";

/** What a quantization takes. */
export interface QuantizationPlan {
  /** Of the quantized matrices: codes, scales and codebooks. */
  bitsPerWeight: number;
  outputBytes: number;
  /** Work files at their largest: two layers' activations of both streams, and finished blocks. */
  workBytes: number;
  /** Main memory at its peak. */
  ramBytes: number;
  /** GPU memory at its peak, of blocks and of model tuning (0 when there is none). */
  blockGpuBytes: number;
  modelGpuBytes: number;
  /** Floating-point operations of each phase, over all blocks; those of model tuning apart. */
  operations: Record<GpuPhase | "model", number>;
  /** Of the whole run, at the rates measured on an NVIDIA H200. */
  seconds: number;
}

/** Phases whose time the GPU decides. */
export type GpuPhase = Exclude<Phase, "read" | "write">;

/**
 * Operations per second that the phases reached on an NVIDIA H200: those of blocks in Llama-3 70B's shape
 * (`deno task bench quantize`), that of model tuning with story-16m.
 */
const MEASURED_RATES: Record<GpuPhase | "model", number> = {
  capture: 20.3e12,
  codes: 11.8e12,
  codebooks: 24.8e12,
  tuning: 14.3e12,
  outputs: 12.9e12,
  model: 9e12,
};
/** Float bytes per second through the rest of it: looked through, read, to the GPU, result written. */
const MEASURED_BYTE_RATE = 88e6;
/** What a block takes where its products take nothing, as story-16m's: first codebooks, small work. */
const BLOCK_SECONDS = 1.8;
/** Memory of the process itself, and of what the garbage collector has not yet taken. */
const PROCESS_BYTES = 2 ** 30;
/** What the GPU holds beside the buffers planned here: driver, staging, partial products. */
export const DRIVER_BYTES = 768 * 2 ** 20;
const F32 = 4;
/** Copies of a matrix while it is fitted: itself, what it stands for, difference, slope. */
const FIT_COPIES = 4;
/** Columns of change that a search hands on. */
const CHANGE_COLUMNS = 128;
const CENTROIDS = 256;

/**
 * Plans a quantization.
 *
 * @param text calibration tokens and those of a sequence
 * @throws FleetError `bad-checkpoint` as the quantization would
 */
export function planQuantization(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  settings: CalibratedSettings,
  text: { tokens: number; sequences: number },
): QuantizationPlan {
  const { config } = checkpoint, { m, v, g } = format;
  const { hiddenSize: hidden, vocabSize, layers, tiedEmbeddings } = config;
  const items = planTensors(checkpoint, format, settings.keep, settings.fallback);
  let weights = 0, stored = 0, floatBytes = 0;
  const keptOfLayer = new Map<string, number>();
  for (const item of items) {
    const { shape, bytes } = checkpoint.info(item.source);
    const count = shape.reduce((a, b) => a * b);
    floatBytes += bytes;
    if (item.type === "quantize") {
      weights += count;
      stored += item.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
    } else {
      const layer = /^model\.layers\.\d+/.exec(item.source)?.[0];
      if (layer) keptOfLayer.set(layer, (keptOfLayer.get(layer) ?? 0) + count);
    }
  }
  const outputBytes = items.flatMap((item) => item.tensors)
    .reduce((sum, tensor) => sum + tensor.bytes, 0);
  const kept = Math.max(0, ...keptOfLayer.values());

  const sizes = layerSizes(config, format);
  const { layerWeights, largest, hessians } = sizes;
  const rows = settings.batchSequences * text.tokens;
  const blockTokens = blockBatches(settings, text.sequences) * rows;
  const activations = activationFloats(config, text.tokens);
  const forward = layerWeights + rows * activations.forward;
  const both = 2 * layerWeights + rows * (activations.forward + activations.backward);

  // Codes are a word each; scales and codebooks have gradients and two moments while they are tuned.
  const coded = layerWeights / v * m + layerWeights / g;
  const tuned = coded + 3 * layerWeights / g + sizes.books;
  const fitted = FIT_COPIES * largest + largest / v * m + 4 * largest / g + sizes.books +
    sizes.mostRows * CHANGE_COLUMNS;
  const comparison = 2 * rows * hidden;
  const copies = settings.rates.codes > 0 ? 3 * layerWeights : 0;
  const ends = (tiedEmbeddings ? 1 : 2) * vocabSize * hidden;
  const teacher = both + layers * layerWeights + vocabSize * hidden;
  // The best model so far is kept beside the one that is tuned.
  const student = both + ends + layers * (tuned + coded + copies + rows * hidden) +
    2 * rows * vocabSize;
  const state = layers *
    (2 * coded + 4 * (layerWeights / g + LINEAR_NAMES.length * m * CENTROIDS * v) + copies);
  const streams = 4 * blockTokens * hidden * 2;
  const operations = countOperations(config, settings, sizes, text, rows, blockTokens);
  return {
    bitsPerWeight: weights === 0 ? 16 : 8 * stored / weights,
    outputBytes,
    workBytes: Math.max(
      streams + outputBytes,
      // A state of model tuning is removed when the next is there.
      settings.modelSteps === 0
        ? 0
        : outputBytes + text.sequences * text.tokens * hidden * 2 + 2 * F32 * state,
    ),
    ramBytes: PROCESS_BYTES + Math.max(
      vocabSize * hidden * 2 * 2,
      // A layer's floats, a matrix being read; its codes as they were fitted, tuned and rounded.
      (layerWeights + largest + 3 * coded) * F32,
      settings.modelSteps === 0 ? 0 : (layers * (layerWeights + 2 * coded) + 2 * ends) * F32,
    ),
    blockGpuBytes: DRIVER_BYTES + F32 * Math.max(
          forward + hessians,
          hessians + fitted,
          settings.blockSteps > 0 ? both + tuned + kept + comparison : 0,
          forward + coded + kept + comparison,
        ),
    modelGpuBytes: settings.modelSteps === 0 ? 0 : DRIVER_BYTES + F32 * Math.max(teacher, student),
    operations,
    seconds: estimateSeconds(operations, layers, floatBytes),
  };
}

type LayerSizes = ReturnType<typeof layerSizes>;

/** Elements of a layer's matrices and Hessians. */
function layerSizes(config: ModelConfig, { m, v }: CodeGemmFormat) {
  const shapes = LINEAR_NAMES.map((name) => linearShape(config, name));
  const { hiddenSize, heads, headDim, ffnSize } = config;
  const widths: Record<BlockInput, number> = {
    attention: hiddenSize,
    output: heads * headDim,
    mlp: hiddenSize,
    down: ffnSize,
  };
  const layerWeights = shapes.reduce((sum, [n, k]) => sum + n * k, 0);
  return {
    layerWeights,
    largest: Math.max(...shapes.map(([n, k]) => n * k)),
    mostRows: Math.max(...shapes.map(([n]) => n)),
    /** Codebooks with their gradients, the partial ones among them, and moments. */
    books: shapes.reduce(
      (sum, [n, k]) => sum + m * CENTROIDS * v * (4 + gradientChunks(n * k / v).chunks),
      0,
    ),
    /** Operations of `D H` for the differences of all matrices. */
    slope: shapes.reduce((sum, [n, k]) => sum + 2 * n * k * k, 0),
    /** Operations of comparing all centroids for every code: products with a v x v matrix. */
    search: layerWeights / v * m * CENTROIDS * 2 * v * (v + 2) * (m === 1 ? 1 : 2),
    hessians: BLOCK_INPUTS.reduce((sum, input) => sum + widths[input] ** 2, 0),
  };
}

/** Floats of a row's activations in a layer, forward and what backward adds. */
function activationFloats(
  { hiddenSize, heads, kvHeads, headDim, ffnSize }: ModelConfig,
  tokens: number,
): { forward: number; backward: number } {
  const ofHeads = 4 * headDim * (heads + kvHeads) + heads * tokens;
  return {
    forward: 5.5 * hiddenSize + 3 * ffnSize + ofHeads + 4,
    backward: 3.5 * hiddenSize + 3 * ffnSize + ofHeads,
  };
}

function countOperations(
  { hiddenSize, heads, headDim, vocabSize, layers }: ModelConfig,
  settings: CalibratedSettings,
  { layerWeights, slope, search, hessians }: LayerSizes,
  text: { tokens: number; sequences: number },
  rows: number,
  blockTokens: number,
): QuantizationPlan["operations"] {
  const { fitRounds, fitSteps, blockSteps, modelSteps } = settings;
  const forward = 2 * layerWeights + 4 * text.tokens * heads * headDim;
  // A sweep measures the slope, and carries changes to the columns that follow.
  const sweeps = fitRounds === 0 ? 0 : fitRounds + 1;
  const model = modelSteps === 0 ? 0 : text.sequences * text.tokens * layers * forward +
    modelSteps * rows * (4 * layers * forward + 6 * vocabSize * hiddenSize);
  return {
    capture: layers * blockTokens * 2 * (forward + hessians),
    codes: layers * (3 * slope + search + sweeps * (1.5 * slope + search)),
    codebooks: layers * fitRounds * fitSteps * slope,
    tuning: layers * blockSteps * rows * 3 * forward,
    outputs: layers * blockTokens * forward,
    model,
  };
}

function estimateSeconds(
  operations: QuantizationPlan["operations"],
  layers: number,
  floatBytes: number,
): number {
  let seconds = layers * BLOCK_SECONDS + floatBytes / MEASURED_BYTE_RATE;
  for (const [phase, count] of Object.entries(operations)) {
    seconds += count / MEASURED_RATES[phase as keyof typeof operations];
  }
  return seconds;
}

/** The plan as people read it. */
export function describePlan(plan: QuantizationPlan): string {
  const gib = (bytes: number) =>
    bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  const operations = Object.values(plan.operations).reduce((sum, count) => sum + count, 0);
  return [
    `bits per quantized weight  ${plan.bitsPerWeight.toFixed(3)}`,
    `output                     ${gib(plan.outputBytes)}`,
    `work files                 ${gib(plan.workBytes)}`,
    `main memory                ${gib(plan.ramBytes)}`,
    `GPU memory, blocks         ${gib(plan.blockGpuBytes)}`,
    `GPU memory, whole model    ${
      plan.modelGpuBytes ? gib(plan.modelGpuBytes) : "not tuned whole"
    }`,
    `matrix products            ${(operations / 1e12).toPrecision(3)} TFLOP`,
    `time                       about ${duration(plan.seconds)} on an NVIDIA H200`,
  ].join("\n");
}
