/**
 * Bytes of GPU memory that a stage takes, from the model's shapes and the stage's limits: what the
 * planner counts with before anything is loaded, and what a worker shows as its use.
 *
 * Every term is an upper bound of one buffer or group of buffers; padding to the kernels' blocks is
 * included.
 *
 * @module
 */
import { LIMITS } from "./limits.ts";
import {
  type CodeGemmFormat,
  codesPerWord,
  LINEAR_NAMES,
  linearShape,
  matrixFormat,
  type ModelConfig,
  type PartName,
  stageParts,
} from "./model_config.ts";
import type { StageLimits } from "./protocol.ts";

const F32 = 4, F16 = 2, U32 = 4;
/** An activation as an integer, with its part of a scale of 16 at least. */
const INT8 = 1 + F32 / 16;

/** Rows of N are padded to this much per row block of a matrix, at most. */
const N_ALIGN = 256;
/** Rows of N that the largest row block covers, of a CodeGEMM and of a dense matrix. */
const N_BLOCK = 2048;
const DENSE_N_BLOCK = 128;
/** K of a dense matrix is padded to this much. */
const K_ALIGN = 32;
/** Workgroups that a split over K aims for: it bounds the partial sums of a linear layer. */
const SPLIT_WORKGROUPS = 640;
/** The shortest split over K. */
const SPLIT_K = 64;
/** Positions of a split of decode attention: never less than a page. */
const SPLIT_TOKENS = LIMITS.pageTokens;
/** Decode attention runs its rows in batches whose partial results stay under this, or one row. */
const ATTENTION_SCRATCH_BYTES = 32 * 2 ** 20;
/** Partial sums of decode rows stay under this, or sixteen rows: the most that a kernel takes at once. */
const LINEAR_SCRATCH_BYTES = 64 * 2 ** 20;
const LINEAR_SCRATCH_ROWS = 16;
/** Sampling: bytes per output, and per output and chunk of its vocabulary. */
const SAMPLING_OUTPUT_BYTES = 8 * 2 ** 10;
const SAMPLING_CHUNK_BYTES = 256;
const SAMPLING_CHUNK_TOKENS = 2048;
/** A result of a row that samples, with its alternatives. */
const RESULT_BYTES = 256;
/** Uniforms, and buffers too small to name. */
const SMALL_BUFFERS_BYTES = 1 * 2 ** 20;

/** A run of layers. */
export interface StageRange {
  /** Layers `[from, to)`. */
  from: number;
  to: number;
  first: boolean;
  last: boolean;
}

/** Where a stage's memory goes, bytes. */
export interface Footprint {
  weightBytes: number;
  kvBytes: number;
  /** Activations, partial sums, step inputs, staging: independent of the number of layers. */
  scratchBytes: number;
  totalBytes: number;
}

/** Layers of a stage with their weights, pages and scratch. */
export function stageFootprint(
  config: ModelConfig,
  stage: StageRange,
  limits: StageLimits,
): Footprint {
  const weightBytes = stageParts(stage).reduce((sum, part) => sum + partBytes(config, part), 0);
  const kvBytes = (stage.to - stage.from) * limits.pages * kvPageBytes(config);
  const scratchBytes = scratchFootprint(config, stage, limits);
  return { weightBytes, kvBytes, scratchBytes, totalBytes: weightBytes + kvBytes + scratchBytes };
}

/** Bytes of a part on the GPU. */
export function partBytes(config: ModelConfig, part: PartName): number {
  const { hiddenSize, vocabSize } = config;
  const norm = hiddenSize * F32;
  if (part === "embedding") return vocabSize * hiddenSize * F16;
  if (part === "head") return denseBytes(vocabSize, hiddenSize) + norm;
  const matrices = LINEAR_NAMES.map((name) => matrixBytes(config, ...linearShape(config, name)));
  return matrices.reduce((sum, bytes) => sum + bytes, 0) + 2 * norm;
}

/** Bytes of a layer's codebooks: they take memory, but a decode step finds them in a cache. */
export function layerCodebookBytes({ codegemm }: ModelConfig): number {
  return codegemm === null ? 0 : LINEAR_NAMES.length * codebookBytes(codegemm);
}

/** In float16; and those of 8-bit codes in int8 beside, with a scale. */
function codebookBytes({ m, v, b }: CodeGemmFormat): number {
  const elements = m * 2 ** b * v;
  return elements * F16 + (b === 8 ? elements + F32 : 0);
}

function matrixBytes({ codegemm }: ModelConfig, n: number, k: number): number {
  if (!codegemm) return denseBytes(n, k);
  const { m, v, g } = matrixFormat(codegemm, k);
  const paddedN = roundUp(n, N_ALIGN) + N_ALIGN * Math.ceil(n / N_BLOCK);
  const codes = m * (k / v) * paddedN * U32 / codesPerWord(codegemm);
  const scales = (k / g) * paddedN * F16;
  return codes + codebookBytes(codegemm) + scales;
}

function denseBytes(n: number, k: number): number {
  return roundUp(n, N_ALIGN) * roundUp(k, K_ALIGN) * F16;
}

/** Bytes of one page of one layer: keys and values of 32 positions, heads padded to 4 elements. */
export function kvPageBytes(config: ModelConfig): number {
  return 2 * kvBindingBytesPerPage(config);
}

/** What a page adds to the largest single KV buffer (a layer's keys, or its values). */
export function kvBindingBytesPerPage({ kvHeads, headDim }: ModelConfig): number {
  return LIMITS.pageTokens * kvHeads * roundUp(headDim, 4) * F16;
}

/** All that does not depend on the number of layers. */
function scratchFootprint(config: ModelConfig, stage: StageRange, limits: StageLimits): number {
  const { hiddenSize, heads, kvHeads, headDim, ffnSize } = config;
  const { maxRows } = limits;
  const qkvColumns = (heads + 2 * kvHeads) * headDim;
  const activations = maxRows * (
    hiddenSize * F32 + // residual
    hiddenSize * F16 + // normed
    qkvColumns * F32 + // q | k | v
    heads * headDim * F16 + // attention output
    2 * ffnSize * F32 + // gate | up
    ffnSize * F16 + // SwiGLU output
    2 * hiddenSize * F16 + // activations on their way in and out
    Math.max(hiddenSize, heads * headDim, ffnSize) * INT8 // a matrix's input as integers
  );
  const rope = limits.contextTokens * roundUp(headDim, 2) * F32;
  return activations + rope + attentionPartials(config, limits) + linearPartials(config, limits) +
    stepInputs(limits) + staging(config, stage, limits) +
    (stage.last ? outputRows(config, limits) : 0) + SMALL_BUFFERS_BYTES;
}

/** Partial results of decode attention, one set per split of the context. */
function attentionPartials({ heads, headDim }: ModelConfig, limits: StageLimits): number {
  const splits = Math.ceil(limits.contextTokens / SPLIT_TOKENS);
  const rowBytes = heads * splits * (4 + roundUp(headDim, 4)) * F32;
  return Math.max(rowBytes, Math.min(limits.maxRows * rowBytes, ATTENTION_SCRATCH_BYTES));
}

/** Partial sums over K of the linear layer that takes most; all layers share one buffer. */
function linearPartials(config: ModelConfig, limits: StageLimits): number {
  const bytes = ([n, k]: [number, number], block: number, maxRows: number) => {
    const paddedN = roundUp(n, N_ALIGN) + N_ALIGN;
    const splits = Math.ceil(k / SPLIT_K);
    const row = Math.min(splits * paddedN, SPLIT_WORKGROUPS * block + paddedN) * F32;
    const all = row * roundUp(maxRows, LINEAR_SCRATCH_ROWS);
    return Math.min(all, Math.max(LINEAR_SCRATCH_BYTES, row * LINEAR_SCRATCH_ROWS));
  };
  const block = config.codegemm ? N_BLOCK : DENSE_N_BLOCK;
  const { heads, kvHeads, headDim, ffnSize, hiddenSize } = config;
  // Queries, keys and values may run as one matrix, gate and up as another.
  const stacks: [number, number][] = [
    [(heads + 2 * kvHeads) * headDim, hiddenSize],
    [2 * ffnSize, hiddenSize],
  ];
  const shapes = [...LINEAR_NAMES.map((name) => linearShape(config, name)), ...stacks];
  const head: [number, number] = [config.vocabSize, config.hiddenSize];
  return Math.max(
    ...shapes.map((shape) => bytes(shape, block, limits.maxRows)),
    bytes(head, DENSE_N_BLOCK, limits.maxOutputs),
  );
}

/** Rows, tiles, page tables and output rows of a step, four words each at most. */
function stepInputs(limits: StageLimits): number {
  const pageEntries = limits.maxSequences *
    Math.min(limits.pages, Math.ceil(limits.contextTokens / LIMITS.pageTokens));
  return (4 * limits.maxRows + 4 * (limits.maxRows + limits.maxSequences) + pageEntries +
    limits.maxOutputs) * U32;
}

/** Mapped buffers to read outputs back, and what the driver holds of weights being written. */
function staging(config: ModelConfig, stage: StageRange, limits: StageLimits): number {
  // Rows of logits are read back as far as they fit a frame.
  const outputs = stage.last
    ? limits.maxOutputs * RESULT_BYTES + LIMITS.maxFrameBytes
    : limits.maxRows * config.hiddenSize * F16;
  return LIMITS.maxStepsInFlightPerStage * outputs + LIMITS.maxShardBytes;
}

/** The output head's rows: normed input, logits, and what sampling keeps of them. */
function outputRows({ hiddenSize, vocabSize }: ModelConfig, limits: StageLimits): number {
  const chunks = Math.ceil(vocabSize / SAMPLING_CHUNK_TOKENS);
  const perOutput = hiddenSize * F16 + vocabSize * F32 + SAMPLING_OUTPUT_BYTES +
    chunks * SAMPLING_CHUNK_BYTES;
  const adjustments = Math.min(
    limits.maxOutputs * (LIMITS.maxBiasEntries + LIMITS.maxCountEntries),
    LIMITS.maxAdjustmentsPerStep,
  );
  return limits.maxOutputs * perOutput + adjustments * 2 * U32;
}

function roundUp(value: number, step: number): number {
  return Math.ceil(value / step) * step;
}
