/**
 * How requests, adjustments and results of sampling lie in their buffers: from typed requests to
 * words, and from words back to results.
 *
 * @module
 */
import { FleetError, invariant } from "../../shared/errors.ts";
import type { RowRequest, RowResult, SamplingParams } from "../../shared/frames.ts";
import { LIMITS } from "../../shared/limits.ts";

/** Tokens of a row that one workgroup takes. */
export const CHUNK_TOKENS = 2048;
/** Words of `Request` in `common.wgsl`. */
export const REQUEST_WORDS = 12;
/** Words of `RowState` in `common.wgsl`. */
export const STATE_WORDS = 12;
/** Status, token, log-probability, log-sum-exp; alternatives' tokens; their log-probabilities. */
export const RESULT_WORDS = 4 + 2 * LIMITS.maxAlternatives;
/** Bytes of a row's results. */
export const RESULT_BYTES = 4 * RESULT_WORDS;
/** Sums of probabilities overflow from here on; see `filter.wgsl`. */
export const MAX_VOCAB = 2 ** 19 - 1;

/** Above this the draw is as good as greedy, and the products stay finite. */
const MAX_INVERSE_TEMPERATURE = 1e6;
const FINITE = 1;

const MODES = { logits: 0, score: 1, greedy: 2, draw: 3 } as const;

invariant(LIMITS.maxAlternatives === 20, "RESULT_WORDS in common.wgsl is 44");

/** Entries of the adjustments buffer: the bound per row, and that of a step, whichever is less. */
export function maxAdjustments(outputs: number): number {
  const perRow = LIMITS.maxBiasEntries + LIMITS.maxCountEntries;
  return Math.min(outputs * perRow, LIMITS.maxAdjustmentsPerStep);
}

/** A row that is drawn at a temperature above 0. */
export function draws(request: RowRequest): boolean {
  return request.type === "sample" && request.sampling.temperature > 0;
}

/** A drawn row whose choice top_k or top_p narrows. */
export function filters(request: RowRequest, vocab: number): boolean {
  if (request.type !== "sample" || !draws(request)) return false;
  return effectiveTopK(request.sampling, vocab) > 0 || request.sampling.topP < 1;
}

/** `topK`, or 0 where it keeps everything. */
export function effectiveTopK(sampling: SamplingParams, vocab: number): number {
  return sampling.topK >= vocab ? 0 : sampling.topK;
}

/** `1 / temperature` as the kernels use it. */
export function inverseTemperature(sampling: SamplingParams): number {
  return Math.fround(Math.min(1 / sampling.temperature, MAX_INVERSE_TEMPERATURE));
}

/**
 * Writes one request's {@linkcode REQUEST_WORDS} words.
 *
 * @param position of the row; the token that follows it is keyed by the next one
 * @throws FleetError `bad-frame` when a token is beyond the vocabulary
 */
export function writeRequest(
  words: DataView,
  output: number,
  request: RowRequest,
  position: number,
  vocab: number,
): void {
  const at = output * REQUEST_WORDS * 4;
  const u32 = (word: number, value: number) => words.setUint32(at + 4 * word, value, true);
  const f32 = (word: number, value: number) => words.setFloat32(at + 4 * word, value, true);
  for (let word = 0; word < REQUEST_WORDS; word++) u32(word, 0);
  f32(3, 1);
  switch (request.type) {
    case "logits":
      return u32(0, MODES.logits);
    case "score":
      checkToken(request.token, vocab);
      u32(0, MODES.score);
      return u32(1, request.token);
    case "sample": {
      const { sampling } = request;
      invariant(sampling.alternatives <= LIMITS.maxAlternatives, "alternatives are bounded");
      u32(0, draws(request) ? MODES.draw : MODES.greedy);
      f32(2, draws(request) ? inverseTemperature(sampling) : 1);
      f32(3, sampling.topP);
      u32(4, effectiveTopK(sampling, vocab));
      u32(5, Math.min(sampling.alternatives, vocab));
      u32(6, sampling.seedLow);
      u32(7, sampling.seedHigh);
      u32(8, sampling.choice);
      return u32(9, position + 1);
    }
    default:
      request satisfies never;
  }
}

/**
 * What bias and penalties add to a row's logits: `bias - presence * [count > 0] - frequency * count`,
 * rounded to float32, one sum per token, in the order in which the tokens are named.
 *
 * @throws FleetError `bad-frame` when a token is beyond the vocabulary
 */
export function adjustments(sampling: SamplingParams, vocab: number): Map<number, number> {
  const deltas = new Map<number, number>();
  const add = (token: number, delta: number) => {
    checkToken(token, vocab);
    deltas.set(token, (deltas.get(token) ?? 0) + delta);
  };
  sampling.biasTokens.forEach((token, i) => add(token, sampling.biasValues[i]));
  sampling.countTokens.forEach((token, i) => {
    const count = sampling.counts[i];
    if (count === 0) return;
    add(token, -sampling.presencePenalty - sampling.frequencyPenalty * count);
  });
  return deltas;
}

function checkToken(token: number, vocab: number): void {
  if (token < vocab) return;
  throw new FleetError("bad-frame", `Token ${token} is beyond the vocabulary of ${vocab}`);
}

/**
 * Results from the bytes of the results buffer, whole rows of logits behind them.
 *
 * @param bytes `(requests, RESULT_WORDS)` words, then a row of `vocab` f32 for each `logits` request
 * @throws FleetError `gpu` when a row's logits are not finite
 */
export function decodeResults(
  bytes: Uint8Array<ArrayBuffer>,
  requests: RowRequest[],
  vocab: number,
): RowResult[] {
  const words = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let rowsAt = requests.length * RESULT_BYTES;
  return requests.map((request, output): RowResult => {
    const at = output * RESULT_BYTES;
    if (words.getUint32(at, true) !== FINITE) {
      throw new FleetError("gpu", `The logits of row ${request.row} are not finite`);
    }
    const logprob = words.getFloat32(at + 8, true);
    switch (request.type) {
      case "score":
        return { type: "score", row: request.row, logprob };
      case "logits": {
        const logits = floats(words, rowsAt, vocab);
        rowsAt += 4 * vocab;
        return { type: "logits", row: request.row, logits };
      }
      case "sample": {
        const count = Math.min(request.sampling.alternatives, vocab);
        return {
          type: "sample",
          row: request.row,
          token: words.getUint32(at + 4, true),
          logprob,
          alternativeTokens: Uint32Array.from(
            { length: count },
            (_, i) => words.getUint32(at + 16 + 4 * i, true),
          ),
          alternativeLogprobs: floats(words, at + 16 + 4 * LIMITS.maxAlternatives, count),
        };
      }
    }
  });
}

function floats(words: DataView, at: number, count: number): Float32Array {
  return Float32Array.from({ length: count }, (_, i) => words.getFloat32(at + 4 * i, true));
}
