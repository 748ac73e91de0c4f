/**
 * A layer on the GPU with its way in and out: activations of the calibration text come from work
 * files as float16, go through the layer, and go back.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import type { Block, BlockShape } from "./gpu/forward.ts";
import { half } from "./gpu/half.ts";
import { type Operation, Recorder } from "./gpu/operation.ts";
import { rowwise } from "./gpu/rows.ts";

/** Activations of the calibration text between two layers, batch by batch, float16 in words. */
export interface Activations {
  read(batch: number): Promise<Uint32Array<ArrayBuffer>>;
  write(batch: number, words: Uint32Array<ArrayBuffer>): Promise<void>;
}

/** A layer with its way in and out. */
export interface Stage<B extends Block> {
  recorder: Recorder;
  block: B;
  /** Float16 words of a batch. */
  words: GPUBuffer;
  wordCount: number;
  /** From the words into the layer, and from its output into the words. */
  enter: Operation;
  leave: Operation;
}

/**
 * Makes a layer's buffers, uses them, and frees them.
 *
 * @param create of the layer's buffers: forward only, or both ways
 */
export async function withStage<B extends Block, T>(
  gpu: Gpu,
  config: ModelConfig,
  shape: BlockShape,
  create: (recorder: Recorder, config: ModelConfig, shape: BlockShape) => Promise<B>,
  use: (stage: Stage<B>) => Promise<T>,
): Promise<T> {
  const recorder = new Recorder(gpu);
  try {
    const block = await gpu.allocate(
      "a block and its activations; lower --batch or --sequence",
      () => create(recorder, config, shape),
    );
    const count = block.rows * config.hiddenSize;
    const words = recorder.buffer("float16", count / 2);
    return await use({
      recorder,
      block,
      words,
      wordCount: count / 2,
      enter: await half(recorder, "unpack", block.x, words, count),
      leave: await half(recorder, "pack", block.out, words, count),
    });
  } finally {
    recorder.destroy();
  }
}

/**
 * Records how a layer's output differs from the float16 words in the stage.
 *
 * @param gradient takes the difference: the loss's gradient
 * @returns with the sums over each row of the difference's and of the wanted output's squares
 */
export async function compareOutputs(
  { recorder, block, words, wordCount }: Stage<Block>,
  gradient: GPUBuffer,
): Promise<{ operations: Operation[]; sums: GPUBuffer }> {
  const wanted = recorder.buffer("wanted", 2 * wordCount);
  const sums = recorder.buffer("sums", 2 * block.rows);
  return {
    sums,
    operations: [
      await half(recorder, "unpack", wanted, words, 2 * wordCount),
      await rowwise(recorder, "difference", [block.out, wanted, gradient, sums], {
        rows: block.rows,
        columns: 2 * wordCount / block.rows,
      }),
    ],
  };
}
