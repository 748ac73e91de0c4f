/**
 * Tunes all layers together: the quantized model learns to predict what the float model predicts
 * (distillation), over codebooks, scales, norms and codes. The last step of AQLM's and PV-Tuning's
 * pipelines; for models that fit on one GPU whole.
 *
 * @module
 */
import type { CodeGemmFormat, ModelConfig } from "../../shared/model_config.ts";
import { Adam } from "./adam.ts";
import { type BlockShape, createBlock } from "./block.ts";
import { half } from "./half.ts";
import { matmul } from "./matmul.ts";
import type { Operation, Recorder } from "./operation.ts";
import { normWeightBack, rowwise } from "./rows.ts";
import {
  createTunedLayer,
  type LayerArrays,
  meanSquare,
  type TunedLayer,
  type TuneRates,
} from "./tuned_layer.ts";

/** The parts of a model around its layers, as float32. */
export interface ModelEnds {
  embedding: Float32Array<ArrayBuffer>;
  finalNorm: Float32Array<ArrayBuffer>;
  /** `(vocab, hidden)`; the embedding where that is the head. */
  head: Float32Array<ArrayBuffer>;
}

/** What tuning minimizes: mean divergence from the float model, and loss of the next token. */
export interface TuneLoss {
  divergence: number;
  nextToken: number;
}

/** The layers of a model, run over batches of whole sequences: the teacher. */
export class ModelRunner {
  readonly #recorder: Recorder;
  readonly #operations: Operation[];
  readonly #tokens: GPUBuffer;
  readonly #hidden: GPUBuffer;
  readonly #words: number;

  private constructor(
    recorder: Recorder,
    operations: Operation[],
    tokens: GPUBuffer,
    hidden: GPUBuffer,
    words: number,
  ) {
    this.#recorder = recorder;
    this.#operations = operations;
    this.#tokens = tokens;
    this.#hidden = hidden;
    this.#words = words;
  }

  /** Puts layers on the GPU and records them. */
  static async create(
    recorder: Recorder,
    config: ModelConfig,
    format: CodeGemmFormat,
    shape: BlockShape,
    layers: readonly LayerArrays[],
    ends: ModelEnds,
  ): Promise<ModelRunner> {
    const block = await createBlock(recorder, config, shape);
    const { rows } = block, { hiddenSize } = config;
    const table = recorder.upload("embedding", ends.embedding);
    const tokens = recorder.buffer("tokens", rows);
    const hidden = recorder.buffer("hidden", rows * hiddenSize / 2);
    const operations: Operation[] = [
      await rowwise(recorder, "embed", [table, tokens, block.x], { rows, columns: hiddenSize }),
    ];
    for (const arrays of layers) {
      const layer = await createTunedLayer(recorder, block, config, format, arrays);
      operations.push(...layer.load, ...block.forward);
      operations.push(recorder.copy(block.out, block.x, rows * hiddenSize));
    }
    operations.push(await half(recorder, "pack", block.x, hidden, rows * hiddenSize));
    return new ModelRunner(recorder, operations, tokens, hidden, rows * hiddenSize / 2);
  }

  /** Runs token ids `(rows)` through the layers and reads their outputs, float16. */
  async run(tokens: Uint16Array | Uint32Array): Promise<Uint32Array<ArrayBuffer>> {
    this.#recorder.gpu.write(this.#tokens, 0, Float32Array.from(tokens));
    this.#recorder.run(this.#operations);
    return await this.#recorder.words(this.#hidden, this.#words);
  }
}

/** What a step is fed with, and what it leaves. */
interface TunerBuffers {
  tokens: GPUBuffer;
  next: GPUBuffer;
  /** Float16 words. */
  teacher: GPUBuffer;
  losses: GPUBuffer;
  finalNorm: GPUBuffer;
}

/** A quantized model being tuned. */
export class ModelTuner {
  readonly #recorder: Recorder;
  readonly #adam: Adam;
  readonly #operations: Operation[];
  readonly #layers: TunedLayer[];
  readonly #shape: BlockShape;
  readonly #buffers: TunerBuffers;
  readonly #hiddenSize: number;

  private constructor(
    recorder: Recorder,
    adam: Adam,
    operations: Operation[],
    layers: TunedLayer[],
    shape: BlockShape,
    buffers: TunerBuffers,
    hiddenSize: number,
  ) {
    this.#recorder = recorder;
    this.#adam = adam;
    this.#operations = operations;
    this.#layers = layers;
    this.#shape = shape;
    this.#buffers = buffers;
    this.#hiddenSize = hiddenSize;
  }

  /**
   * @param share of the next token in the loss; the rest is the float model's distribution
   */
  static async create(
    recorder: Recorder,
    config: ModelConfig,
    format: CodeGemmFormat,
    shape: BlockShape,
    arrays: readonly LayerArrays[],
    ends: ModelEnds,
    rates: TuneRates,
    share: number,
  ): Promise<ModelTuner> {
    const block = await createBlock(recorder, config, shape);
    const adam = new Adam(recorder);
    const { rows } = block, { hiddenSize: hidden, vocabSize: vocab, rmsNormEps: value } = config;
    const buffer = (label: string, count: number) => recorder.buffer(label, count);
    const buffers = {
      tokens: buffer("tokens", rows),
      next: buffer("next tokens", rows),
      teacher: buffer("teacher's hidden state", rows * hidden / 2),
      losses: buffer("losses", 2 * rows),
      finalNorm: recorder.upload("final norm", ends.finalNorm),
    };
    const table = recorder.upload("embedding", ends.embedding);
    const head = ends.head === ends.embedding ? table : recorder.upload("head", ends.head);
    const teacherNorm = recorder.upload("teacher's norm", ends.finalNorm);
    const layers: TunedLayer[] = [];
    for (const layer of arrays) {
      layers.push(
        await createTunedLayer(recorder, block, config, format, layer, { adam, rates }),
      );
    }
    const inputs = layers.map((_, i) => buffer(`input of layer ${i}`, rows * hidden));
    const last = buffer("last hidden", rows * hidden), teacher = buffer("teacher", rows * hidden);
    const normed = buffer("normed", rows * hidden), inverse = buffer("1 / rms", rows);
    const dnormed = buffer("d normed", rows * hidden), dnorm = buffer("d final norm", hidden);
    const zeros = buffer("zeros", rows * hidden), dlast = buffer("d last", rows * hidden);
    const logits = buffer("logits", rows * vocab), wanted = buffer("wanted", rows * vocab);
    const toLogits = (x: GPUBuffer, to: GPUBuffer) =>
      matmul(recorder, {
        label: "logits",
        a: { buffer: x, stride: hidden },
        b: { buffer: head, stride: hidden },
        transposeB: true,
        c: { buffer: to, stride: vocab },
        m: rows,
        n: vocab,
        k: hidden,
      });
    const norm = (x: GPUBuffer, weight: GPUBuffer) =>
      rowwise(recorder, "norm", [x, weight, normed, inverse], { rows, columns: hidden, value });
    const operations: Operation[] = [
      await rowwise(recorder, "embed", [table, buffers.tokens, inputs[0]], {
        rows,
        columns: hidden,
      }),
    ];
    const enter = (i: number) => [
      recorder.copy(inputs[i], block.x, rows * hidden),
      ...layers[i].load,
      ...block.forward,
    ];
    layers.forEach((_, i) => {
      operations.push(...enter(i));
      operations.push(recorder.copy(block.out, inputs[i + 1] ?? last, rows * hidden));
    });
    operations.push(
      await half(recorder, "unpack", teacher, buffers.teacher, rows * hidden),
      await norm(teacher, teacherNorm),
      ...await toLogits(normed, wanted),
      await norm(last, buffers.finalNorm),
      ...await toLogits(normed, logits),
      await rowwise(recorder, "distill", [wanted, buffers.next, logits, buffers.losses], {
        rows,
        columns: vocab,
        value: share,
      }),
      ...await matmul(recorder, {
        label: "d normed",
        a: { buffer: logits, stride: vocab },
        b: { buffer: head, stride: hidden },
        c: { buffer: dnormed, stride: hidden },
        m: rows,
        n: hidden,
        k: vocab,
      }),
      recorder.copy(zeros, dlast, rows * hidden),
      await rowwise(recorder, "norm_back", [last, buffers.finalNorm, dnormed, dlast, inverse], {
        rows,
        columns: hidden,
      }),
      ...await normWeightBack(
        recorder,
        { x: last, gradient: dnormed, inverse, out: dnorm },
        rows,
        hidden,
      ),
      await adam.update(
        buffers.finalNorm,
        dnorm,
        hidden,
        rates.norms * meanSquare(ends.finalNorm),
      ),
      recorder.copy(dlast, block.dout, rows * hidden),
    );
    for (let i = layers.length - 1; i >= 0; i--) {
      // The last layer's forward still stands in the block.
      if (i < layers.length - 1) operations.push(...enter(i));
      operations.push(...block.backward, ...layers[i].update);
      operations.push(recorder.copy(block.dx, block.dout, rows * hidden));
    }
    return new ModelTuner(recorder, adam, operations, layers, shape, buffers, hidden);
  }

  /**
   * Queues step `t` of `steps`.
   *
   * @param tokens `(sequences, tokens)`
   * @param teacher the float model's last hidden state of them, float16
   */
  step(
    t: number,
    steps: number,
    tokens: Uint16Array | Uint32Array,
    teacher: Uint32Array<ArrayBuffer>,
  ): void {
    const { gpu } = this.#recorder;
    const perSequence = this.#shape.tokens;
    const next = Float32Array.from(
      tokens,
      (_, i) => (i + 1) % perSequence === 0 ? -1 : tokens[i + 1],
    );
    gpu.write(this.#buffers.tokens, 0, Float32Array.from(tokens));
    gpu.write(this.#buffers.next, 0, next);
    gpu.write(this.#buffers.teacher, 0, teacher);
    this.#adam.begin(t, steps);
    this.#recorder.run(this.#operations);
  }

  /** The losses of the last step; waits for it. */
  async loss(): Promise<TuneLoss> {
    const rows = this.#shape.sequences * this.#shape.tokens;
    const losses = await this.#recorder.floats(this.#buffers.losses, 2 * rows);
    let divergence = 0, nextToken = 0;
    for (let row = 0; row < rows; row++) {
      divergence += losses[2 * row] / rows;
      nextToken += losses[2 * row + 1] / (rows - this.#shape.sequences);
    }
    return { divergence, nextToken };
  }

  /** Reads the layers and the final norm back. */
  async arrays(): Promise<{ layers: LayerArrays[]; finalNorm: Float32Array<ArrayBuffer> }> {
    const layers: LayerArrays[] = [];
    for (const layer of this.#layers) layers.push(await layer.arrays());
    const finalNorm = await this.#recorder.floats(this.#buffers.finalNorm, this.#hiddenSize);
    return { layers, finalNorm };
  }
}
