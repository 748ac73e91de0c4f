/**
 * Paged grouped-query attention over the KV cache, for decode rows and for prefill rows.
 *
 * @module
 */
import type { Gpu } from "../gpu.ts";
import type { Kernel, StepShape } from "../kernel.ts";
import { prefillWgsl } from "./attention_wgsl.ts";
import { decodeSplitWgsl } from "./decode_attention_wgsl.ts";
import { decodeJoinWgsl } from "./decode_join_wgsl.ts";
import { headTile, SPLIT_TOKENS } from "./decode_tiling.ts";
import { Dispatch } from "./dispatch.ts";
import type { StepInputs, TransformerShape } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

/** What attention reads and writes. */
export interface AttentionOptions {
  gpu: Gpu;
  inputs: StepInputs;
  shape: HeadShape;
  /** float32, `(rows, (heads + 2 kvHeads) headDim)`: the queries stand first, turned by RoPE. */
  qkv: GPUBuffer;
  /** The layer's pages, as `kv_layout.ts` says. */
  keys: GPUBuffer;
  values: GPUBuffer;
  /** float16, `(rows, heads * headDim)`. */
  attended: GPUBuffer;
}

/** What decode attention needs beside. */
export interface DecodeAttentionOptions extends AttentionOptions {
  scratch: DecodeScratch;
}

/** Scratch bytes that decode attention aims to stay under; one row's partials are the least. */
const SCRATCH_BYTES = 32 * 2 ** 20;

/**
 * Room for the partial results of decode rows. A step's rows are cut into batches of as many as have
 * room at the step's longest context.
 */
export interface DecodeScratch {
  /** float32. */
  partials: GPUBuffer;
  /** Rows times splits that there is room for: at least one row of the longest context. */
  rowSplits: number;
  /** Per batch of a step but the first: its index, and {@linkcode rowSplits}. */
  laterBatches: GPUBuffer[];
  /** Bytes on the GPU. */
  bytes: number;
}

const splitsOf = (contextTokens: number) => Math.ceil(Math.max(1, contextTokens) / SPLIT_TOKENS);

/** Bytes of a {@linkcode DecodeScratch}'s partials, its room, and the most batches of a step. */
export function decodeScratchSize(
  shape: HeadShape,
  limits: { maxRows: number; contextTokens: number },
  scratchBytes = SCRATCH_BYTES,
): { bytes: number; rowSplits: number; batches: number } {
  const splits = splitsOf(limits.contextTokens);
  const splitBytes = shape.heads * (4 + shape.paddedDim) * 4;
  const fit = Math.max(1, Math.floor(scratchBytes / (splits * splitBytes)));
  const rows = Math.min(limits.maxRows, fit);
  const rowSplits = rows * splits;
  return { bytes: rowSplits * splitBytes, rowSplits, batches: Math.ceil(limits.maxRows / rows) };
}

/**
 * Allocates the scratch that the decode attention of every layer of a stage shares.
 *
 * @param scratchBytes what to stay under if one row allows it; it changes no result
 */
export function createDecodeScratch(
  gpu: Gpu,
  shape: HeadShape,
  limits: { maxRows: number; contextTokens: number },
  scratchBytes = SCRATCH_BYTES,
): DecodeScratch {
  const size = decodeScratchSize(shape, limits, scratchBytes);
  const laterBatches = Array.from({ length: size.batches - 1 }, (_, later) => {
    const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
    const batch = gpu.buffer("attention batch", 16, usage);
    gpu.write(batch, 0, Uint32Array.of(1 + later, size.rowSplits));
    return batch;
  });
  const partials = gpu.storage("attention partials", size.bytes);
  const bytes = laterBatches.reduce((sum, batch) => sum + batch.size, partials.size);
  return { partials, rowSplits: size.rowSplits, laterBatches, bytes };
}

/** Frees a scratch; idempotent. */
export function destroyDecodeScratch(scratch: DecodeScratch): void {
  scratch.partials.destroy();
  scratch.laterBatches.forEach((batch) => batch.destroy());
}

/** Attention of the step's decode rows. */
export async function createDecodeAttention(options: DecodeAttentionOptions): Promise<Kernel> {
  const batches = await createDecodeBatches(options);
  return {
    label: "decode attention",
    encode(pass, step) {
      for (const { split, join } of batches) {
        split.encode(pass, step);
        join.encode(pass, step);
      }
    },
  };
}

/** The two dispatches of each batch of decode rows: every split on its own, then all of them joined. */
export function createDecodeBatches(
  options: DecodeAttentionOptions,
): Promise<{ split: Kernel; join: Kernel }[]> {
  const { gpu, inputs, shape, qkv, keys, values, attended, scratch } = options;
  const headTiles = shape.kvHeads * Math.ceil(shape.group / headTile(shape));
  const { rows, pageTables } = inputs;
  return Promise.all([null, ...scratch.laterBatches].map(async (batch, index) => {
    const place = batch ? "later" : "first";
    const placing = batch ? [inputs.step, batch] : [];
    const rowsOf = ({ decodeRows, contextTokens }: StepShape) => {
      const most = Math.floor(scratch.rowSplits / splitsOf(contextTokens));
      return Math.max(0, Math.min(most, decodeRows - index * most));
    };
    const split = await Dispatch.create({
      gpu,
      label: "decode attention, splits",
      code: decodeSplitWgsl(shape, place),
      buffers: [rows, pageTables, qkv, keys, values, scratch.partials, ...placing],
      workgroups: (step) => [splitsOf(step.contextTokens), headTiles, rowsOf(step)],
    });
    const join = await Dispatch.create({
      gpu,
      label: "decode attention, join",
      code: decodeJoinWgsl(shape, place),
      buffers: [rows, scratch.partials, attended, ...placing],
      workgroups: (step) => [shape.heads, rowsOf(step)],
    });
    return { split, join };
  }));
}

/** Attention of the step's prefill rows, tile by tile. */
export function createPrefillAttention(
  options: AttentionOptions,
): Promise<Dispatch<TransformerShape>> {
  const { gpu, inputs, shape, qkv, keys, values, attended } = options;
  return Dispatch.create<TransformerShape>({
    gpu,
    label: "prefill attention",
    code: prefillWgsl(shape),
    buffers: [inputs.tiles, inputs.rows, inputs.pageTables, qkv, keys, values, attended],
    workgroups: (step) => [step.prefillTiles, shape.heads],
  });
}
