/**
 * The activations of a stage, allocated once for its limits.
 *
 * @module
 */
import type { ModelConfig } from "../shared/model_config.ts";
import type { StageLimits } from "../shared/protocol.ts";
import type { Gpu } from "../kernels/gpu.ts";
import {
  createDecodeScratch,
  type DecodeScratch,
  destroyDecodeScratch,
  type HeadShape,
  ropeAngles,
} from "../kernels/transformer/mod.ts";

/** What every stage has. Shapes have `maxRows` rows. */
export interface StageBuffers {
  /** float16 `(rows, hidden)`: what comes from the previous stage, or goes to the next. */
  frame: GPUBuffer;
  /** float32 `(rows, hidden)`. */
  residual: GPUBuffer;
  /** float16 `(rows, hidden)`: the input of the linear layers behind a norm. */
  normed: GPUBuffer;
  /** float32 `(rows, (heads + 2 kvHeads) headDim)`. */
  qkv: GPUBuffer;
  /** float16 `(rows, heads * headDim)`. */
  attended: GPUBuffer;
  /** float32 `(rows, 2 ffn)`. */
  gateUp: GPUBuffer;
  /** float16 `(rows, ffn)`. */
  gated: GPUBuffer;
  /** float32 `(contextTokens, headDim / 2, 2)`. */
  angles: GPUBuffer;
  /** Of the last stage. */
  head: HeadBuffers | null;
}

/** What the last stage has beside. Shapes have `maxOutputs` rows. */
export interface HeadBuffers {
  /** float16 `(outputs, hidden)`. */
  normed: GPUBuffer;
  /** float32 `(outputs, vocab)`. */
  logits: GPUBuffer;
}

/** The buffers of a stage, and what decode attention needs. */
export interface StageMemory {
  buffers: StageBuffers;
  attentionScratch: DecodeScratch;
  bytes: number;
  destroy(): void;
}

/** @throws FleetError `out-of-memory` */
export async function createStageMemory(
  gpu: Gpu,
  config: ModelConfig,
  shape: HeadShape,
  limits: StageLimits,
  last: boolean,
): Promise<StageMemory> {
  return await gpu.allocate(`activations of ${limits.maxRows} rows`, () => {
    const made: GPUBuffer[] = [];
    const storage = (label: string, rows: number, columns: number, elementBytes: number) => {
      const buffer = gpu.storage(label, rows * columns * elementBytes);
      made.push(buffer);
      return buffer;
    };
    const { maxRows, maxOutputs, contextTokens } = limits;
    const { hiddenSize, ffnSize, heads, kvHeads, headDim, vocabSize } = config;
    const buffers: StageBuffers = {
      frame: storage("frame", maxRows, hiddenSize, 2),
      residual: storage("residual", maxRows, hiddenSize, 4),
      normed: storage("normed", maxRows, hiddenSize, 2),
      qkv: storage("qkv", maxRows, (heads + 2 * kvHeads) * headDim, 4),
      attended: storage("attended", maxRows, heads * headDim, 2),
      gateUp: storage("gate up", maxRows, 2 * ffnSize, 4),
      gated: storage("gated", maxRows, ffnSize, 2),
      angles: storage("angles", contextTokens, headDim, 4),
      head: last
        ? {
          normed: storage("outputs", maxOutputs, hiddenSize, 2),
          logits: storage("logits", maxOutputs, vocabSize, 4),
        }
        : null,
    };
    const rope = { headDim, theta: config.ropeTheta, scaling: config.ropeScaling };
    gpu.write(buffers.angles, 0, ropeAngles(rope, contextTokens));
    const attentionScratch = createDecodeScratch(gpu, shape, limits);
    return {
      buffers,
      attentionScratch,
      bytes: made.reduce((sum, buffer) => sum + buffer.size, attentionScratch.bytes),
      destroy() {
        made.forEach((buffer) => buffer.destroy());
        destroyDecodeScratch(attentionScratch);
      },
    };
  });
}
