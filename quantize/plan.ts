/**
 * What a quantization with calibration will take, before it begins: sizes, memory, time.
 *
 * @module
 */
import type { Checkpoint } from "../shared/checkpoint/mod.ts";
import { type CodeGemmFormat, LINEAR_NAMES, linearShape } from "../shared/model_config.ts";
import type { CalibratedSettings } from "./calibrated.ts";
import { planTensors } from "./output.ts";
import { hessianParts } from "./quantize_block.ts";

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
  /** Floating-point operations of matrix products, which take nearly all of the time. */
  operations: number;
}

/** Operations per second that a whole run over story-16m reached on an NVIDIA H200. */
export const MEASURED_FLOPS = 7e12;
/** Memory of the process itself, and of what the garbage collector has not yet taken. */
const PROCESS_BYTES = 512 * 2 ** 20;
const F32 = 4;
/** Copies of a matrix while it is fitted: itself, what it stands for, difference, slope, change. */
const FIT_COPIES = 5;

/**
 * Plans a quantization.
 *
 * @param text calibration tokens and those of a sequence
 * @param maxBindingBytes of the adapter: it decides how Hessians are cut
 * @throws FleetError `bad-checkpoint` as the quantization would
 */
export function planQuantization(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  settings: CalibratedSettings,
  text: { tokens: number; sequences: number },
  maxBindingBytes: number,
): QuantizationPlan {
  const { config } = checkpoint, { m, v, g } = format;
  const { hiddenSize: hidden, heads, kvHeads, headDim, ffnSize, vocabSize, layers } = config;
  const items = planTensors(checkpoint, format, settings.keep, settings.fallback);
  let weights = 0, stored = 0;
  for (const item of items) {
    if (item.type !== "quantize") continue;
    weights += checkpoint.info(item.source).shape.reduce((a, b) => a * b);
    stored += item.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
  }
  const outputBytes = items.flatMap((item) => item.tensors)
    .reduce((sum, tensor) => sum + tensor.bytes, 0);

  const shapes = LINEAR_NAMES.map((name) => linearShape(config, name));
  const layerWeights = shapes.reduce((sum, [n, k]) => sum + n * k, 0);
  const rows = settings.batchSequences * text.tokens;
  const blockSequences = Math.floor(
    Math.min(settings.blockSequences, text.sequences) / settings.batchSequences,
  ) * settings.batchSequences;
  const blockTokens = blockSequences * text.tokens;
  const inputs = [hidden, heads * headDim, hidden, ffnSize];
  const parts = inputs.map((k) =>
    hessianParts(k, g, maxBindingBytes).map(([, columns]) => columns)
  );
  const hessians = parts.flat().reduce((sum, columns) => sum + columns ** 2, 0);

  const wide = heads * headDim, narrow = kvHeads * headDim;
  const activations = rows * (2 * (2 * wide + 3 * narrow + 4 * ffnSize) + wide + 8 * hidden) +
    2 * rows * heads * text.tokens;
  const largest = Math.max(...shapes.map(([n, k]) => n * k));
  const block = 2 * layerWeights + activations;
  // Coded matrices: a word a code, with gradients and moments of what is tuned beside it.
  const coded = layerWeights / v * m + 4 * layerWeights / g;
  const copies = settings.rates.codes > 0 ? 3 * layerWeights : 0;
  const ends = (config.tiedEmbeddings ? 1 : 2) * vocabSize * hidden;
  const teacher = layers * layerWeights + vocabSize * hidden + 2 * layerWeights + activations;
  const student = ends + layers * (coded + copies + rows * hidden) + block + 2 * rows * vocabSize;

  const attention = 4 * text.tokens * wide;
  const forward = 2 * layerWeights + attention;
  const fit = shapes.reduce((sum, [n, k]) => sum + 2 * n * k * k, 0) *
    (settings.fitRounds * (2 + settings.fitSteps) + 4);
  const perBlock = blockTokens * (3 * forward + 2 * hessians) + fit +
    settings.blockSteps * rows * 3 * forward;
  const model = settings.modelSteps === 0 ? 0 : text.sequences * text.tokens * layers * forward +
    settings.modelSteps * rows * (4 * layers * forward + 6 * vocabSize * hidden);
  const streams = 4 * blockTokens * hidden * 2;
  return {
    bitsPerWeight: weights === 0 ? 16 : 8 * stored / weights,
    outputBytes,
    workBytes: Math.max(
      streams + outputBytes,
      settings.modelSteps === 0 ? 0 : outputBytes + text.sequences * text.tokens * hidden * 2,
    ),
    ramBytes: PROCESS_BYTES + Math.max(
      vocabSize * hidden * 2 * 2,
      layerWeights * (F32 + 4) + coded * 2 * F32,
      settings.modelSteps === 0 ? 0 : (layers * (layerWeights + 2 * coded) + 2 * ends) * F32,
    ),
    blockGpuBytes: F32 *
      (block + hessians + Math.max(FIT_COPIES * largest + largest / v * m, coded * 2)),
    modelGpuBytes: settings.modelSteps === 0 ? 0 : F32 * Math.max(teacher, student),
    operations: layers * perBlock + model,
  };
}

/** The plan as people read it. */
export function describePlan(plan: QuantizationPlan): string {
  const gib = (bytes: number) =>
    bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  const seconds = plan.operations / MEASURED_FLOPS;
  const time = seconds < 600 ? `${seconds.toFixed(0)} s` : `${(seconds / 3600).toFixed(1)} h`;
  return [
    `bits per quantized weight  ${plan.bitsPerWeight.toFixed(3)}`,
    `output                     ${gib(plan.outputBytes)}`,
    `work files                 ${gib(plan.workBytes)}`,
    `main memory                ${gib(plan.ramBytes)}`,
    `GPU memory, blocks         ${gib(plan.blockGpuBytes)}`,
    `GPU memory, whole model    ${
      plan.modelGpuBytes ? gib(plan.modelGpuBytes) : "not tuned whole"
    }`,
    `matrix products            ${(plan.operations / 1e12).toFixed(0)} TFLOP, ` +
    `${time} at the ${MEASURED_FLOPS / 1e12} TFLOP/s measured on an NVIDIA H200`,
  ].join("\n");
}
