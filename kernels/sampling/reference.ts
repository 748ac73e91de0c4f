/**
 * Sampling in plain loops: what the kernels are compared with. float64 where they have float32, so
 * equal answers are expected except where two candidates are within rounding of each other; the
 * margins say how close that was.
 *
 * @module
 */
import type { RowRequest, SamplingParams } from "../../shared/frames.ts";
import { adjustments, effectiveTopK, inverseTemperature } from "./layout.ts";
import { philox4x32 } from "./philox.ts";

/** A row's answer, and by how much it won. */
export interface ReferenceResult {
  token: number;
  logprob: number;
  alternativeTokens: number[];
  alternativeLogprobs: number[];
  /** The winning score less the runner-up's. */
  margin: number;
  /** How far the nearest boundary of top_p's set is from `topP`, as mass; infinite without top_p. */
  boundary: number;
}

/** Answers one request on its row of logits. */
export function sampleReference(
  logits: Float32Array,
  request: RowRequest,
  position: number,
): ReferenceResult {
  const row = request.type === "sample" ? adjusted(logits, request.sampling) : logits;
  const order = byFallingLogit(row);
  const logSumExp = row[order[0]] +
    Math.log(row.reduce((sum, logit) => sum + Math.exp(logit - row[order[0]]), 0));
  const logprob = (token: number) => row[token] - logSumExp;
  const count = request.type === "sample" ? request.sampling.alternatives : 0;
  const alternativeTokens = [...order.subarray(0, count)];
  const rest = { alternativeTokens, alternativeLogprobs: alternativeTokens.map(logprob) };
  if (request.type === "score") {
    const { token } = request;
    return { token, logprob: logprob(token), margin: Infinity, boundary: Infinity, ...rest };
  }
  if (request.type === "logits" || request.sampling.temperature === 0) {
    const token = order[0];
    return { token, logprob: logprob(token), margin: Infinity, boundary: Infinity, ...rest };
  }
  const { kept, boundary } = keep(row, order, request.sampling);
  const { token, margin } = draw(row, kept, request.sampling, position);
  return { token, logprob: logprob(token), margin, boundary, ...rest };
}

/** The probabilities from which a `sample` request draws: `(vocab)` float64. */
export function distribution(logits: Float32Array, sampling: SamplingParams): Float64Array {
  const row = adjusted(logits, sampling), order = byFallingLogit(row);
  const { kept } = keep(row, order, sampling);
  const weights = new Float64Array(row.length);
  for (const token of kept) {
    weights[token] = Math.exp((row[token] - row[order[0]]) * inverseTemperature(sampling));
  }
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

function adjusted(logits: Float32Array, sampling: SamplingParams): Float32Array {
  const row = logits.slice();
  for (const [token, delta] of adjustments(sampling, row.length)) {
    row[token] += Math.fround(delta);
  }
  return row;
}

/** Tokens from the most to the least probable, equals by rising id. */
function byFallingLogit(row: Float32Array): Uint32Array {
  return Uint32Array.from(row, (_, token) => token).sort((a, b) => row[b] - row[a] || a - b);
}

/** The tokens that top_k and top_p both let pass. Equals of the last one pass with it. */
function keep(row: Float32Array, order: Uint32Array, sampling: SamplingParams) {
  const topK = effectiveTopK(sampling, row.length) || row.length;
  let threshold = row[order[topK - 1]], boundary = Infinity;
  if (sampling.topP < 1) {
    const weights = Float64Array.from(
      order,
      (token) => Math.exp((row[token] - row[order[0]]) * inverseTemperature(sampling)),
    );
    const wanted = Math.fround(sampling.topP) * weights.reduce((a, b) => a + b, 0);
    let mass = 0, last = 0;
    for (; last < order.length; last++) {
      const before = mass;
      mass += weights[last];
      boundary = Math.min(Math.abs(before - wanted), Math.abs(mass - wanted)) / wanted;
      if (mass >= wanted) break;
    }
    threshold = Math.max(threshold, row[order[Math.min(last, order.length - 1)]]);
  }
  return { kept: order.filter((token) => row[token] >= threshold), boundary };
}

function draw(row: Float32Array, kept: Uint32Array, sampling: SamplingParams, position: number) {
  const largest = row[byFallingLogit(row)[0]];
  let best = -Infinity, second = -Infinity, token = -1;
  for (const candidate of kept.toSorted()) {
    const noise = gumbel(sampling, position + 1, candidate);
    const score = (row[candidate] - largest) * inverseTemperature(sampling) + noise;
    if (score > best) {
      [second, best, token] = [best, score, candidate];
    } else if (score > second) {
      second = score;
    }
  }
  return { token, margin: best - second };
}

/** The noise of a token; see `draw.wgsl`. */
export function gumbel(sampling: SamplingParams, position: number, token: number): number {
  const key: [number, number] = [sampling.seedLow, sampling.seedHigh];
  const words = philox4x32([token >>> 2, position, sampling.choice, 0], key);
  const bits = words[token & 3];
  let t = (bits + 0.5) * 2 ** -32;
  if (bits < 256) {
    const more = philox4x32([token, position, sampling.choice, 1], key)[0];
    t = bits * 2 ** -32 + (more + 0.5) * 2 ** -64;
  }
  return -Math.log(-Math.log1p(-Math.min(t, 1 - 2 ** -24)));
}
