/**
 * One transformer layer: fitted matrix by matrix to the inputs that the quantized layers before it
 * give, then tuned as a whole to give what the float model gives.
 *
 * The GPU holds one thing at a time: the layer forward, one matrix and the Hessians, the layer both
 * ways. So the largest of the three decides how much memory a model takes.
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
import { capture } from "./capture.ts";
import { trainCodebooks } from "./codebooks.ts";
import { Adam } from "./gpu/adam.ts";
import { createBlock } from "./gpu/block.ts";
import { fitMatrix, type FitSettings } from "./gpu/fit.ts";
import { createForward, MATRIX_INPUTS } from "./gpu/forward.ts";
import { Recorder } from "./gpu/operation.ts";
import { createTunedLayer, type LayerArrays, type TuneRates } from "./gpu/tuned_layer.ts";
import { fromStored, toStored } from "./layout.ts";
import type { Stopwatch } from "./phases.ts";
import { type Activations, compareOutputs, withStage } from "./stage.ts";

/** How a block is quantized. */
export interface BlockSettings extends FitSettings {
  /** Tuning steps of the whole block; 0 leaves it as it was fitted. */
  blockSteps: number;
  /** Groups of each matrix that the first codebooks are trained on. */
  sampleGroups: number;
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
  /** Hessians that take more are cut into bands. */
  maxHessianBytes: number;
}

/** What became of a matrix. Errors are relative, weighted by the Hessian; before: plain k-means. */
export interface MatrixFit {
  name: LinearName;
  errorBefore: number;
  errorAfter: number;
  seconds: number;
}

/** What became of a block. */
export interface BlockReport {
  matrices: MatrixFit[];
  /** Relative, of the layer's output from the quantized model's inputs, against the float model's. */
  outputError: number;
}

const RATES: TuneRates = { codebooks: 0.002, scales: 0.002, norms: 0.001, codes: 0 };
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
  watch: Stopwatch,
): Promise<{ layer: LayerArrays; report: BlockReport }> {
  const { matrices, reports } = await fitMatrices(gpu, task, settings, random, watch);
  const fitted = { matrices, norms: task.layer.norms };
  const layer = rounded(await tuneBlock(gpu, task, settings.blockSteps, fitted), task);
  watch.lap("tuning");
  watch.tell(`${settings.blockSteps} steps of tuning`);
  const outputError = await runQuantized(gpu, task, layer);
  gpu.check();
  watch.lap("outputs");
  watch.tell(`quantized outputs, error ${percent(outputError)}`);
  return { layer, report: { matrices: reports, outputError } };
}

/** Fits every matrix that is not kept. */
async function fitMatrices(
  gpu: Gpu,
  task: BlockTask,
  settings: BlockSettings,
  random: Random,
  watch: Stopwatch,
): Promise<{ matrices: LayerArrays["matrices"]; reports: MatrixFit[] }> {
  const keeper = new Recorder(gpu);
  try {
    const hessians = await capture(gpu, keeper, task);
    watch.lap("capture");
    watch.tell("float outputs and Hessians");
    const start = startCodebooks(task, settings, random);
    watch.lap("codebooks");
    const matrices = {} as LayerArrays["matrices"];
    const reports: MatrixFit[] = [];
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
        hessians[MATRIX_INPUTS[name]],
        start,
        task.format,
        settings,
        watch,
      );
      matrices[name] = arrays;
      const seconds = watch.tell(
        `${name}, error ${percent(errorBefore)} -> ${percent(errorAfter)}`,
      );
      reports.push({ name, errorBefore, errorAfter, seconds });
    }
    return { matrices, reports };
  } finally {
    keeper.destroy();
  }
}

const percent = (share: number) => `${(100 * share).toFixed(2)} %`;

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
  gpu: Gpu,
  { config, format, shape, inputs, outputs, batches }: BlockTask,
  steps: number,
  start: LayerArrays,
): Promise<LayerArrays> {
  if (steps === 0) return start;
  return await withStage(gpu, config, shape, createBlock, async (stage) => {
    const { recorder, block, words, enter } = stage;
    const adam = new Adam(recorder);
    const layer = await createTunedLayer(recorder, block, config, format, start, {
      adam,
      rates: RATES,
    });
    const compare = await compareOutputs(stage, block.dout);
    for (let t = 0; t < steps; t++) {
      const batch = t % batches;
      const input = await inputs.quantized.read(batch), wanted = await outputs.float.read(batch);
      gpu.write(words, 0, input);
      recorder.run([enter, ...layer.load, ...block.forward]);
      gpu.write(words, 0, wanted);
      adam.begin(t, steps);
      recorder.run([...compare.operations, ...block.backward, ...layer.update]);
      if (t % STEPS_AHEAD === STEPS_AHEAD - 1) await gpu.device.queue.onSubmittedWorkDone();
      else await recorder.pace();
    }
    return await layer.arrays();
  });
}

/** The quantized layer over its own inputs. @returns its relative error against the float model */
function runQuantized(
  gpu: Gpu,
  { config, format, shape, inputs, outputs, batches }: BlockTask,
  arrays: LayerArrays,
): Promise<number> {
  return withStage(gpu, config, shape, createForward, async (stage) => {
    const { recorder, block, words, wordCount, enter, leave } = stage;
    const layer = await createTunedLayer(recorder, block, config, format, arrays);
    const compare = await compareOutputs(stage, recorder.buffer("difference", 2 * wordCount));
    let error = 0, norm = 0;
    recorder.run(layer.load);
    for (let batch = 0; batch < batches; batch++) {
      gpu.write(words, 0, await inputs.quantized.read(batch));
      recorder.run([enter, ...block.forward, leave]);
      await outputs.quantized.write(batch, await recorder.words(words, wordCount));
      gpu.write(words, 0, await outputs.float.read(batch));
      recorder.run(compare.operations);
      const sums = await recorder.floats(compare.sums, 2 * block.rows);
      for (let row = 0; row < block.rows; row++) {
        error += sums[2 * row];
        norm += sums[2 * row + 1];
      }
    }
    return norm === 0 ? 0 : Math.sqrt(error / norm);
  });
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
