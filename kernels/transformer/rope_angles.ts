/**
 * Cosines and sines of rotary position embedding, computed in float64.
 *
 * @module
 */
import type { Llama3RopeScaling } from "../../shared/model_config.ts";

/** What decides the angles. */
export interface RopeOptions {
  headDim: number;
  theta: number;
  scaling: Llama3RopeScaling | null;
}

/**
 * Radians per position of each pair of elements, `(headDim / 2)`.
 *
 * With `llama3` scaling (Hugging Face transformers, `modeling_rope_utils.py`): wavelengths beyond
 * `original context / lowFreqFactor` turn `factor` times slower, those under
 * `original context / highFreqFactor` as before, and between them the two are blended linearly in
 * the number of turns within the original context.
 */
export function ropeFrequencies({ headDim, theta, scaling }: RopeOptions): Float64Array {
  return Float64Array.from({ length: headDim / 2 }, (_, i) => {
    const frequency = theta ** (-2 * i / headDim);
    if (scaling === null) return frequency;
    const { factor, lowFreqFactor, highFreqFactor, originalContextTokens } = scaling;
    const turns = originalContextTokens * frequency / (2 * Math.PI);
    if (turns < lowFreqFactor) return frequency / factor;
    if (turns > highFreqFactor) return frequency;
    const share = (turns - lowFreqFactor) / (highFreqFactor - lowFreqFactor);
    return (1 - share) * frequency / factor + share * frequency;
  });
}

/** Cosine and sine of each position's angles, `(contextTokens, headDim / 2, 2)`. */
export function ropeAngles(
  options: RopeOptions,
  contextTokens: number,
): Float32Array<ArrayBuffer> {
  const frequencies = ropeFrequencies(options);
  const table = new Float32Array(contextTokens * frequencies.length * 2);
  let at = 0;
  for (let position = 0; position < contextTokens; position++) {
    for (const frequency of frequencies) {
      table[at++] = Math.cos(position * frequency);
      table[at++] = Math.sin(position * frequency);
    }
  }
  return table;
}
