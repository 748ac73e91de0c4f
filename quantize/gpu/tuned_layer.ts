/**
 * A layer whose codebooks, scales, norms and codes are being tuned: what it loads into a
 * {@linkcode Block} before a forward, and how a backward's gradients change it.
 *
 * Codes follow a float copy of the weights that takes the gradient as if rounding were not there
 * (straight-through estimation, Bengio et al. 2013; PV-Tuning, arXiv 2405.14852, compares ways to do
 * this for codes): a code changes when the copy comes nearer to another centroid.
 *
 * @module
 */
import {
  type CodeGemmFormat,
  LINEAR_NAMES,
  type LinearName,
  linearShape,
  type ModelConfig,
} from "../../shared/model_config.ts";
import type { Adam, Held } from "./adam.ts";
import type { TunableBlock } from "./block.ts";
import { type CodedArrays, CodedMatrix } from "./coded_matrix.ts";
import type { Block } from "./forward.ts";
import type { Operation, Recorder } from "./operation.ts";

/** Rates of tuning, relative to the size of what is tuned; those of a block and of the model differ. */
export interface TuneRates {
  codebooks: number;
  scales: number;
  norms: number;
  /** Of the float copy that codes follow; 0 leaves the codes as they are. */
  codes: number;
}

/** A layer as plain arrays: matrices in codebook format, or float ones that are left alone. */
export interface LayerArrays {
  matrices: Record<LinearName, CodedArrays | Float32Array<ArrayBuffer>>;
  norms: { input: Float32Array<ArrayBuffer>; post: Float32Array<ArrayBuffer> };
}

/** A layer on the GPU. */
export interface TunedLayer {
  /** Puts weights and norms into the block. */
  load: Operation[];
  /** Takes a step against the gradients that the block's backward left. */
  update: Operation[];
  /** What makes the layer: codes, codebooks, scales and norms. */
  weights: Held[];
  arrays(): Promise<LayerArrays>;
}

/** What tunes a layer. */
interface Tuning {
  adam: Adam;
  rates: TuneRates;
}

/** Puts a layer on the GPU to be tuned. */
export function createTunedLayer(
  recorder: Recorder,
  block: TunableBlock,
  config: ModelConfig,
  format: CodeGemmFormat,
  layer: LayerArrays,
  tuning: Tuning,
): Promise<TunedLayer>;
/** Puts a layer on the GPU that is only run. */
export function createTunedLayer(
  recorder: Recorder,
  block: Block,
  config: ModelConfig,
  format: CodeGemmFormat,
  layer: LayerArrays,
): Promise<TunedLayer>;
export async function createTunedLayer(
  recorder: Recorder,
  block: Block | TunableBlock,
  config: ModelConfig,
  format: CodeGemmFormat,
  layer: LayerArrays,
  tuning?: Tuning,
): Promise<TunedLayer> {
  const tuned = tuning && "gradients" in block ? { ...tuning, ...block } : null;
  const load: Operation[] = [], update: Operation[] = [], weights: Held[] = [];
  const matrices = {} as Record<LinearName, () => Promise<CodedArrays | Float32Array<ArrayBuffer>>>;
  for (const name of LINEAR_NAMES) {
    const arrays = layer.matrices[name], shape = linearShape(config, name);
    const { buffer, row } = block.matrices[name];
    const [n, k] = shape;
    await recorder.flush();
    if (arrays instanceof Float32Array) {
      load.push(recorder.copy(recorder.upload(name, arrays), buffer, n * k, 0, row * k));
      matrices[name] = () => Promise.resolve(arrays);
      continue;
    }
    const matrix = new CodedMatrix(recorder, shape, format, arrays);
    load.push(await matrix.dequantize(buffer, row));
    matrices[name] = () => matrix.arrays();
    for (const part of ["codes", "codebooks", "scales"] as const) {
      weights.push({ buffer: matrix[part], count: matrix.counts[part] });
    }
    if (!tuned) continue;
    const { adam, rates } = tuned, { counts } = matrix, gradient = tuned.gradients[name];
    const scaleSize = meanSquare(arrays.scales), bookSize = meanSquare(arrays.codebooks);
    const back = await matrix.backward(gradient, row);
    update.push(
      ...back.operations,
      await adam.update(
        matrix.codebooks,
        back.codebooks,
        counts.codebooks,
        rates.codebooks * bookSize,
      ),
      await adam.update(matrix.scales, back.scales, counts.scales, rates.scales * scaleSize),
    );
    if (rates.codes > 0) {
      const copy = recorder.buffer("float copy", n * k);
      recorder.run([await matrix.dequantize(copy, 0)]);
      update.push(
        await adam.update(copy, gradient, n * k, rates.codes * scaleSize * bookSize, row * k),
        await matrix.nearest(copy, 1),
      );
    }
  }
  const norms = {} as Record<"input" | "post", GPUBuffer>;
  for (const which of ["input", "post"] as const) {
    const values = layer.norms[which];
    norms[which] = recorder.upload(`${which} norm`, values);
    load.push(recorder.copy(norms[which], block.norms[which], values.length));
    weights.push({ buffer: norms[which], count: values.length });
    if (!tuned) continue;
    const rate = tuned.rates.norms * meanSquare(values);
    const gradient = tuned.normGradients[which];
    update.push(await tuned.adam.update(norms[which], gradient, values.length, rate));
  }
  return {
    load,
    update,
    weights,
    async arrays() {
      const read = {} as LayerArrays["matrices"];
      for (const name of LINEAR_NAMES) read[name] = await matrices[name]();
      const { hiddenSize } = config;
      return {
        matrices: read,
        norms: {
          input: await recorder.floats(norms.input, hiddenSize),
          post: await recorder.floats(norms.post, hiddenSize),
        },
      };
    },
  };
}

/** Root of the mean square. */
export function meanSquare(values: Float32Array): number {
  return Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
}
