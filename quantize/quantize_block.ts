/**
 * One transformer layer: fitted matrix by matrix to the inputs that the quantized layers before it
 * give, then tuned as a whole to give what the float model gives.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import {
  type CodeGemmFormat,
  LINEAR_NAMES,
  type LinearName,
  linearShape,
  type ModelConfig,
} from "../shared/model_config.ts";
import { type Random, randomInt } from "../shared/random.ts";
import { trainCodebooks } from "./codebooks.ts";
import { Adam } from "./gpu/adam.ts";
import { type Block, BLOCK_INPUTS, type BlockInput, createBlock } from "./gpu/block.ts";
import type { HessianPart } from "./gpu/coded_matrix.ts";
import { fitMatrix, type FitSettings } from "./gpu/fit.ts";
import { half } from "./gpu/half.ts";
import { matmul } from "./gpu/matmul.ts";
import { type Operation, Recorder } from "./gpu/operation.ts";
import { rowwise } from "./gpu/rows.ts";
import { createTunedLayer, type LayerArrays, type TuneRates } from "./gpu/tuned_layer.ts";
import { fromStored, toStored } from "./layout.ts";

/** How a block is quantized. */
export interface BlockSettings extends FitSettings {
  /** Tuning steps of the whole block; 0 leaves it as it was fitted. */
  blockSteps: number;
  /** Groups of each matrix that the first codebooks are trained on. */
  sampleGroups: number;
}

/** Activations of the calibration text between two layers, batch by batch, float16 in words. */
export interface Activations {
  read(batch: number): Promise<Uint32Array<ArrayBuffer>>;
  write(batch: number, words: Uint32Array<ArrayBuffer>): Promise<void>;
}

/** What a block is made from. */
export interface BlockTask {
  config: ModelConfig;
  format: CodeGemmFormat;
  shape: { sequences: number; tokens: number };
  /** Float weights and norms. */
  layer: { matrices: Record<LinearName, Float32Array<ArrayBuffer>>; norms: LayerArrays["norms"] };
  /** Those that stay float16. */
  kept: ReadonlySet<LinearName>;
  /** What the float model and the quantized one hand to this layer. */
  inputs: { float: Activations; quantized: Activations };
  outputs: { float: Activations; quantized: Activations };
  batches: number;
}

/** What became of a block. Errors are relative. */
export interface BlockReport {
  matrices: { name: LinearName; errorBefore: number; errorAfter: number }[];
  /** Of the layer's output, from the quantized model's inputs, against the float model's. */
  outputError: number;
}

const RATES: TuneRates = { codebooks: 0.002, scales: 0.002, norms: 0.001, codes: 0 };
/** Of the mean of the Hessian's diagonal, added to it: directions that the text does not show. */
const DAMPING = 0.01;
/** Rounds of plain k-means for the codebooks that fitting starts from. */
const START_ROUNDS = 2;
/** Steps that are queued before the GPU is waited for. */
const STEPS_AHEAD = 8;

/** Quantizes one block; float16 rounding of the result is included in its outputs. */
export async function quantizeBlock(
  gpu: Gpu,
  task: BlockTask,
  settings: BlockSettings,
  random: Random,
): Promise<{ layer: LayerArrays; report: BlockReport }> {
  const recorder = new Recorder(gpu);
  try {
    const block = await gpu.allocate(
      "the activations of a block; lower --batch or --sequence",
      () => createBlock(recorder, task.config, task.shape),
    );
    const count = block.rows * task.config.hiddenSize;
    const words = recorder.buffer("float16", count / 2);
    const stage: Stage = {
      recorder,
      block,
      words,
      enter: await half(recorder, "unpack", block.x, words, count),
      leave: await half(recorder, "pack", block.out, words, count),
      count,
    };
    const hessians = await runFloat(stage, task);
    const start = startCodebooks(task, settings, random);
    const matrices = {} as LayerArrays["matrices"];
    const reports: BlockReport["matrices"] = [];
    for (const name of LINEAR_NAMES) {
      const weights = task.layer.matrices[name], shape = linearShape(task.config, name);
      if (task.kept.has(name)) {
        matrices[name] = weights;
        continue;
      }
      const { arrays, errorBefore, errorAfter } = await fitMatrix(
        gpu,
        weights,
        shape,
        hessians[block.matrices[name].input],
        start,
        task.format,
        settings,
      );
      matrices[name] = arrays;
      reports.push({ name, errorBefore, errorAfter });
    }
    const fitted = { matrices, norms: task.layer.norms };
    const layer = rounded(await tuneBlock(stage, task, settings, fitted), task);
    const outputError = await runQuantized(stage, task, layer);
    gpu.check();
    return { layer, report: { matrices: reports, outputError } };
  } finally {
    recorder.destroy();
  }
}

/** A block with its way in and out. */
interface Stage {
  recorder: Recorder;
  block: Block;
  words: GPUBuffer;
  enter: Operation;
  leave: Operation;
  /** Activations. */
  count: number;
}

/**
 * The float layer over both inputs: its outputs over the float model's are what to aim for, its
 * matrices' inputs over the quantized model's give the Hessians.
 */
async function runFloat(
  { recorder, block, words, enter, leave, count }: Stage,
  { config, format, layer, inputs, outputs, batches }: BlockTask,
): Promise<Record<BlockInput, HessianPart[]>> {
  const { gpu } = recorder;
  for (const name of LINEAR_NAMES) {
    const { buffer, row } = block.matrices[name];
    gpu.write(buffer, row * linearShape(config, name)[1] * 4, layer.matrices[name]);
  }
  gpu.write(block.norms.input, 0, layer.norms.input);
  gpu.write(block.norms.post, 0, layer.norms.post);
  const hessians = {} as Record<BlockInput, HessianPart[]>;
  const accumulate: Operation[] = [], damp: Operation[] = [];
  for (const input of BLOCK_INPUTS) {
    const { buffer, columns: all } = block.inputs[input];
    const bound = gpu.limits.maxStorageBufferBindingSize;
    hessians[input] = hessianParts(all, format.g, bound).map(([first, columns]) => ({
      buffer: recorder.buffer(`hessian of ${input}`, columns * columns),
      first,
      columns,
    }));
    for (const { buffer: hessian, first, columns } of hessians[input]) {
      const part = { buffer, stride: all, offset: first };
      accumulate.push(
        ...await matmul(recorder, {
          label: "hessian",
          a: part,
          transposeA: true,
          b: part,
          c: { buffer: hessian, stride: columns },
          m: columns,
          n: columns,
          k: block.rows,
          add: "c",
        }),
      );
      damp.push(
        await rowwise(recorder, "damp", [hessian], { columns, value: DAMPING, workgroups: [1] }),
      );
    }
  }
  for (let batch = 0; batch < batches; batch++) {
    gpu.write(words, 0, await inputs.float.read(batch));
    recorder.run([enter, ...block.forward, leave]);
    await outputs.float.write(batch, await recorder.words(words, count / 2));
    gpu.write(words, 0, await inputs.quantized.read(batch));
    recorder.run([enter, ...block.forward, ...accumulate]);
  }
  recorder.run(damp);
  return hessians;
}

/**
 * Cuts K columns into runs of whole groups whose Hessians each fit a binding: one run, but for the
 * widest matrices of the largest models (28672 squared are 3.3 GB).
 *
 * @param maxBytes of a binding
 * @returns first column and number of columns of each run
 */
export function hessianParts(
  k: number,
  g: number,
  maxBytes: number,
): [first: number, columns: number][] {
  const most = Math.floor(Math.sqrt(maxBytes / 4) / g) * g;
  const parts = Math.ceil(k / most);
  const columns = Math.ceil(k / parts / g) * g;
  return Array.from({ length: Math.ceil(k / columns) }, (_, i) => [
    i * columns,
    Math.min(columns, k - i * columns),
  ]);
}

/** Codebooks to begin with: those of plain k-means over some groups of every matrix. */
function startCodebooks(
  { layer, kept, format }: BlockTask,
  { sampleGroups }: BlockSettings,
  random: Random,
): Float32Array<ArrayBuffer> {
  const { g } = format;
  const names = LINEAR_NAMES.filter((name) => !kept.has(name));
  const sample = new Float32Array(names.length * sampleGroups * g);
  names.forEach((name, at) => {
    const weights = layer.matrices[name];
    for (let i = 0; i < sampleGroups; i++) {
      const group = randomInt(random, weights.length / g) * g;
      sample.set(weights.subarray(group, group + g), (at * sampleGroups + i) * g);
    }
  });
  if (names.length === 0) return new Float32Array(0);
  return trainCodebooks(sample, format, { rounds: START_ROUNDS }, random);
}

/** Tunes codebooks, scales and norms to the float model's outputs. */
async function tuneBlock(
  stage: Stage,
  { config, format, inputs, outputs, batches }: BlockTask,
  { blockSteps }: BlockSettings,
  start: LayerArrays,
): Promise<LayerArrays> {
  if (blockSteps === 0) return start;
  const { recorder, block, words, enter } = stage, { gpu } = recorder;
  const adam = new Adam(recorder);
  const layer = await createTunedLayer(recorder, block, config, format, start, {
    adam,
    rates: RATES,
  });
  const compare = await createComparison(stage, config.hiddenSize);
  for (let t = 0; t < blockSteps; t++) {
    const batch = t % batches;
    const [input, wanted] = [await inputs.quantized.read(batch), await outputs.float.read(batch)];
    gpu.write(words, 0, input);
    recorder.run([enter, ...layer.load, ...block.forward]);
    gpu.write(words, 0, wanted);
    adam.begin(t, blockSteps);
    recorder.run([...compare.operations, ...block.backward, ...layer.update]);
    if (t % STEPS_AHEAD === STEPS_AHEAD - 1) await gpu.device.queue.onSubmittedWorkDone();
  }
  return await layer.arrays();
}

/** The quantized layer over its own inputs. @returns its relative error against the float model */
async function runQuantized(
  stage: Stage,
  { config, format, inputs, outputs, batches }: BlockTask,
  arrays: LayerArrays,
): Promise<number> {
  const { recorder, block, words, enter, leave, count } = stage, { gpu } = recorder;
  const layer = await createTunedLayer(recorder, block, config, format, arrays);
  const compare = await createComparison(stage, config.hiddenSize);
  let error = 0, norm = 0;
  recorder.run(layer.load);
  for (let batch = 0; batch < batches; batch++) {
    gpu.write(words, 0, await inputs.quantized.read(batch));
    recorder.run([enter, ...block.forward, leave]);
    await outputs.quantized.write(batch, await recorder.words(words, count / 2));
    gpu.write(words, 0, await outputs.float.read(batch));
    recorder.run(compare.operations);
    const sums = await recorder.floats(compare.sums, 2 * block.rows);
    for (let row = 0; row < block.rows; row++) {
      error += sums[2 * row];
      norm += sums[2 * row + 1];
    }
  }
  return norm === 0 ? 0 : Math.sqrt(error / norm);
}

/** The block's output against the float16 words in the stage: its gradient, and sums per row. */
async function createComparison(
  { recorder, block, words, count }: Stage,
  columns: number,
): Promise<{ operations: Operation[]; sums: GPUBuffer }> {
  const wanted = recorder.buffer("wanted", count);
  const sums = recorder.buffer("sums", 2 * block.rows);
  return {
    sums,
    operations: [
      await half(recorder, "unpack", wanted, words, count),
      await rowwise(recorder, "difference", [block.out, wanted, block.dout, sums], {
        rows: block.rows,
        columns,
      }),
    ],
  };
}

/** What is left of a layer when it is stored: codebooks, scales and norms in float16. */
function rounded(layer: LayerArrays, { config, format }: BlockTask): LayerArrays {
  const matrices = {} as LayerArrays["matrices"];
  for (const name of LINEAR_NAMES) {
    const matrix = layer.matrices[name], shape = linearShape(config, name);
    matrices[name] = matrix instanceof Float32Array
      ? matrix
      : fromStored(toStored(matrix, format, shape), format, shape);
  }
  const f16 = (values: Float32Array) => Float32Array.from(values, Math.f16round);
  return { matrices, norms: { input: f16(layer.norms.input), post: f16(layer.norms.post) } };
}
