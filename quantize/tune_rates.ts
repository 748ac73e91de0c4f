/**
 * How fast a model is tuned: in steps of its quantization error. What is already near its float
 * weights moves little, so that one setting serves two bits as well as four.
 *
 * @module
 */
import { type CodeGemmFormat, LINEAR_NAMES } from "../shared/model_config.ts";
import type { CodedArrays } from "./gpu/coded_matrix.ts";
import type { LayerArrays, TuneRates } from "./gpu/tuned_layer.ts";

/**
 * Rates of each layer.
 *
 * @param rates per step at the schedule's height, as a part of the relative error
 * @param float the layers that `coded` stands for
 * @returns rates relative to the size of what is tuned
 */
export function layerRates(
  rates: TuneRates,
  float: readonly LayerArrays[],
  coded: readonly LayerArrays[],
  format: CodeGemmFormat,
): TuneRates[] {
  const errors = coded.map((layer, i) => relativeError(float[i], layer, format));
  const known = errors.filter((error) => error !== null);
  const mean = known.reduce((sum, error) => sum + error, 0) / known.length;
  return errors.map((error) => {
    const by = error ?? mean; // Of a layer that is kept whole only the norms are tuned.
    return {
      codebooks: rates.codebooks * by,
      scales: rates.scales * by,
      norms: rates.norms * by,
      codes: rates.codes * by,
    };
  });
}

/** `|W_q - W| / |W|` over the coded matrices of a layer; null when it has none. */
export function relativeError(
  float: LayerArrays,
  coded: LayerArrays,
  format: CodeGemmFormat,
): number | null {
  let error = 0, size = 0;
  for (const name of LINEAR_NAMES) {
    const wanted = float.matrices[name], matrix = coded.matrices[name];
    if (matrix instanceof Float32Array || !(wanted instanceof Float32Array)) continue;
    const [apart, whole] = squares(wanted, matrix, format);
    error += apart;
    size += whole;
  }
  return size === 0 ? null : Math.sqrt(error / size);
}

/** Sums of `(W_q - W)^2` and of `W^2`. */
function squares(
  weights: Float32Array,
  { codes, codebooks, scales }: CodedArrays,
  { m, v, g, b }: CodeGemmFormat,
): [error: number, size: number] {
  const book = 2 ** b * v;
  let error = 0, size = 0;
  for (let vector = 0; vector * v < weights.length; vector++) {
    const scale = scales[Math.floor(vector * v / g)];
    for (let d = 0; d < v; d++) {
      let sum = 0;
      for (let j = 0; j < m; j++) sum += codebooks[j * book + codes[vector * m + j] * v + d];
      const weight = weights[vector * v + d];
      error += (scale * sum - weight) ** 2;
      size += weight * weight;
    }
  }
  return [error, size];
}
