/**
 * Tunes all layers together: the quantized model learns to predict what the float model predicts
 * (distillation), over codebooks, scales, norms and codes. The last step of AQLM's and PV-Tuning's
 * pipelines; for models that fit on one GPU whole.
 *
 * @module
 */
import type { CodeGemmFormat, ModelConfig } from "../../shared/model_config.ts";
import { Adam, type Held } from "./adam.ts";
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

/** What tuning looks at: mean divergence from the float model, and loss of the next token. */
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

/** What is tuned, and how. */
export interface TunerTask {
  config: ModelConfig;
  format: CodeGemmFormat;
  shape: BlockShape;
  layers: readonly LayerArrays[];
  ends: ModelEnds;
  /** Of each layer, relative to the size of what is tuned. */
  rates: readonly TuneRates[];
  /** Of the next token in the loss; the rest is the float model's distribution. */
  share: number;
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
  readonly #forward: Operation[];
  readonly #backward: Operation[];
  readonly #layers: TunedLayer[];
  readonly #task: TunerTask;
  readonly #buffers: TunerBuffers;
  /** What makes the model, and a copy of each as it was when {@linkcode keep} was called. */
  readonly #weights: Held[];
  readonly #kept: Held[];

  private constructor(
    recorder: Recorder,
    adam: Adam,
    { forward, backward }: { forward: Operation[]; backward: Operation[] },
    layers: TunedLayer[],
    task: TunerTask,
    buffers: TunerBuffers,
  ) {
    this.#recorder = recorder;
    this.#adam = adam;
    this.#forward = forward;
    this.#backward = backward;
    this.#layers = layers;
    this.#task = task;
    this.#buffers = buffers;
    this.#weights = [
      ...layers.flatMap((layer) => layer.weights),
      { buffer: buffers.finalNorm, count: task.config.hiddenSize },
    ];
    this.#kept = this.#weights.map(({ count }) => ({
      buffer: recorder.buffer("kept", count),
      count,
    }));
    this.keep();
  }

  /** Puts a model on the GPU and records its steps. */
  static async create(recorder: Recorder, task: TunerTask): Promise<ModelTuner> {
    const { config, format, shape, ends, rates } = task;
    const block = await createBlock(recorder, config, shape);
    const adam = new Adam(recorder);
    const { rows } = block, { hiddenSize: hidden } = config;
    const buffer = (label: string, count: number) => recorder.buffer(label, count);
    const buffers = {
      tokens: buffer("tokens", rows),
      next: buffer("next tokens", rows),
      teacher: buffer("teacher's hidden state", rows * hidden / 2),
      losses: buffer("losses", 2 * rows),
      finalNorm: recorder.upload("final norm", ends.finalNorm),
    };
    const table = recorder.upload("embedding", ends.embedding);
    const layers: TunedLayer[] = [];
    for (const [i, layer] of task.layers.entries()) {
      const tuning = { adam, rates: rates[i] };
      layers.push(await createTunedLayer(recorder, block, config, format, layer, tuning));
    }
    const inputs = layers.map((_, i) => buffer(`input of layer ${i}`, rows * hidden));
    const last = buffer("last hidden", rows * hidden);
    const end = await recordEnd(recorder, task, adam, { ...buffers, table, last }, rows);
    const forward: Operation[] = [
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
      forward.push(...enter(i));
      forward.push(recorder.copy(block.out, inputs[i + 1] ?? last, rows * hidden));
    });
    forward.push(...end.forward);
    const backward = [...end.backward, recorder.copy(end.dlast, block.dout, rows * hidden)];
    for (let i = layers.length - 1; i >= 0; i--) {
      // The last layer's forward still stands in the block.
      if (i < layers.length - 1) backward.push(...enter(i));
      backward.push(...block.backward, ...layers[i].update);
      backward.push(recorder.copy(block.dx, block.dout, rows * hidden));
    }
    return new ModelTuner(recorder, adam, { forward, backward }, layers, task, buffers);
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
    this.#feed(tokens, teacher);
    this.#adam.begin(t, steps);
    this.#recorder.run([...this.#forward, ...this.#backward]);
  }

  /** The losses over a text that nothing is learned from; its arguments are those of a step. */
  async judge(
    tokens: Uint16Array | Uint32Array,
    teacher: Uint32Array<ArrayBuffer>,
  ): Promise<TuneLoss> {
    this.#feed(tokens, teacher);
    this.#recorder.run(this.#forward);
    const { sequences } = this.#task.shape, rows = sequences * this.#task.shape.tokens;
    const losses = await this.#recorder.floats(this.#buffers.losses, 2 * rows);
    let divergence = 0, nextToken = 0;
    for (let row = 0; row < rows; row++) {
      divergence += losses[2 * row] / rows;
      nextToken += losses[2 * row + 1] / (rows - sequences);
    }
    return { divergence, nextToken };
  }

  /** Keeps the model as it is now. */
  keep(): void {
    this.#copy(this.#weights, this.#kept);
  }

  /** Reads layers and final norm back, as they were kept; ends the tuning. */
  async arrays(): Promise<{ layers: LayerArrays[]; finalNorm: Float32Array<ArrayBuffer> }> {
    this.#copy(this.#kept, this.#weights);
    const layers: LayerArrays[] = [];
    for (const layer of this.#layers) layers.push(await layer.arrays());
    const { hiddenSize } = this.#task.config;
    const finalNorm = await this.#recorder.floats(this.#buffers.finalNorm, hiddenSize);
    return { layers, finalNorm };
  }

  /**
   * Hands out, buffer by buffer, what {@linkcode load} takes to go on.
   *
   * @param part `kept` is enough for {@linkcode arrays}, `all` for steps too
   */
  async save(
    part: "kept" | "all",
    write: (bytes: Uint8Array<ArrayBuffer>) => Promise<void>,
  ): Promise<void> {
    for (const { buffer, count } of this.#state(part)) {
      const words = await this.#recorder.words(buffer, count);
      await write(new Uint8Array(words.buffer));
    }
  }

  /** Takes what {@linkcode save} handed out of a tuner of the same task. */
  async load(
    part: "kept" | "all",
    read: (bytes: number) => Promise<Uint8Array<ArrayBuffer>>,
  ): Promise<void> {
    for (const { buffer, count } of this.#state(part)) {
      this.#recorder.gpu.write(buffer, 0, await read(4 * count));
    }
  }

  #feed(tokens: Uint16Array | Uint32Array, teacher: Uint32Array<ArrayBuffer>): void {
    const { gpu } = this.#recorder, perSequence = this.#task.shape.tokens;
    const next = Float32Array.from(
      tokens,
      (_, i) => (i + 1) % perSequence === 0 ? -1 : tokens[i + 1],
    );
    gpu.write(this.#buffers.tokens, 0, Float32Array.from(tokens));
    gpu.write(this.#buffers.next, 0, next);
    gpu.write(this.#buffers.teacher, 0, teacher);
  }

  #copy(from: readonly Held[], to: readonly Held[]): void {
    this.#recorder.run(
      from.map(({ buffer, count }, i) => this.#recorder.copy(buffer, to[i].buffer, count)),
    );
  }

  /** Codes are no parameters: they follow, from where they were. */
  #state(part: "kept" | "all"): Held[] {
    if (part === "kept") return this.#kept;
    const tuned = new Set(this.#adam.state.map(({ buffer }) => buffer));
    const codes = this.#weights.filter(({ buffer }) => !tuned.has(buffer));
    return [...this.#kept, ...codes, ...this.#adam.state];
  }
}

/** Final norm and head: forward to losses and the gradient of the logits, and back to the layers. */
async function recordEnd(
  recorder: Recorder,
  { config, ends, rates, share }: TunerTask,
  adam: Adam,
  buffers: TunerBuffers & { table: GPUBuffer; last: GPUBuffer },
  rows: number,
): Promise<{ forward: Operation[]; backward: Operation[]; dlast: GPUBuffer }> {
  const { hiddenSize: hidden, vocabSize: vocab, rmsNormEps: value } = config;
  const { last, finalNorm, next, losses, table } = buffers;
  const buffer = (label: string, count: number) => recorder.buffer(label, count);
  const head = ends.head === ends.embedding ? table : recorder.upload("head", ends.head);
  const teacherNorm = recorder.upload("teacher's norm", ends.finalNorm);
  const teacher = buffer("teacher", rows * hidden);
  const normed = buffer("normed", rows * hidden), inverse = buffer("1 / rms", rows);
  const dnormed = buffer("d normed", rows * hidden), dnorm = buffer("d final norm", hidden);
  const zeros = buffer("zeros", rows * hidden), dlast = buffer("d last", rows * hidden);
  const logits = buffer("logits", rows * vocab), wanted = buffer("wanted", rows * vocab);
  const toLogits = (to: GPUBuffer) =>
    matmul(recorder, {
      label: "logits",
      a: { buffer: normed, stride: hidden },
      b: { buffer: head, stride: hidden },
      transposeB: true,
      c: { buffer: to, stride: vocab },
      m: rows,
      n: vocab,
      k: hidden,
    });
  const norm = (x: GPUBuffer, weight: GPUBuffer) =>
    rowwise(recorder, "norm", [x, weight, normed, inverse], { rows, columns: hidden, value });
  const normRate = rates.reduce((sum, { norms }) => sum + norms / rates.length, 0);
  return {
    dlast,
    forward: [
      await half(recorder, "unpack", teacher, buffers.teacher, rows * hidden),
      await norm(teacher, teacherNorm),
      ...await toLogits(wanted),
      await norm(last, finalNorm),
      ...await toLogits(logits),
      await rowwise(recorder, "distill", [wanted, next, logits, losses], {
        rows,
        columns: vocab,
        value: share,
      }),
    ],
    backward: [
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
      await rowwise(recorder, "norm_back", [last, finalNorm, dnormed, dlast, inverse], {
        rows,
        columns: hidden,
      }),
      ...await normWeightBack(
        recorder,
        { x: last, gradient: dnormed, inverse, out: dnorm },
        rows,
        hidden,
      ),
      await adam.update(finalNorm, dnorm, hidden, normRate * meanSquare(ends.finalNorm)),
    ],
  };
}
