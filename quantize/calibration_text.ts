/**
 * The text that a quantizer calibrates on, as token ids cut into sequences.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import { randomInt, seededRandom } from "../shared/random.ts";

/** Sequences of equal length, one after another. */
export interface CalibrationText {
  ids: Uint16Array | Uint32Array;
  /** Of each sequence. */
  tokens: number;
  sequences: number;
}

/**
 * Cuts token ids into sequences; a rest that fills none is left out.
 *
 * @param tokens of each sequence, a multiple of 4
 * @param atLeast sequences that are needed
 * @throws FleetError `bad-usage` when there are too few, `tokens` is no multiple of 4, or an id is
 *   outside the vocabulary
 */
export function cutSequences(
  ids: Uint16Array | Uint32Array,
  tokens: number,
  atLeast: number,
  vocabSize: number,
): CalibrationText {
  if (tokens % 4 !== 0) {
    throw new FleetError(
      "bad-usage",
      `--sequence ${tokens}: kernels take four tokens at a time; give a multiple of 4`,
    );
  }
  const sequences = Math.floor(ids.length / tokens);
  if (sequences < atLeast) {
    throw new FleetError(
      "bad-usage",
      `Too little calibration text: ${ids.length} tokens make ${sequences} sequences of ${tokens}, ` +
        `${atLeast} are needed; bring more text, or lower --sequence or --batch`,
    );
  }
  const outside = ids.findIndex((id) => id >= vocabSize);
  if (outside >= 0) {
    throw new FleetError(
      "bad-usage",
      `Calibration token ${outside} is ${ids[outside]}, outside the model's vocabulary of ` +
        `${vocabSize}; was the text tokenized for another model?`,
    );
  }
  return { ids, tokens, sequences };
}

/** Whole batches of the sequences that blocks are fitted and tuned on; one at least. */
export function blockBatches(
  { blockSequences, batchSequences }: { blockSequences: number; batchSequences: number },
  sequences: number,
): number {
  return Math.max(1, Math.floor(Math.min(blockSequences, sequences) / batchSequences));
}

/** All numbers below `count` in a random order that `seed` decides. */
export function shuffled(count: number, seed: number): Uint32Array {
  const random = seededRandom(seed);
  const order = Uint32Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = randomInt(random, i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

/** The ids of chosen sequences, one after another. */
export function gather(text: CalibrationText, chosen: ArrayLike<number>): Uint32Array {
  const out = new Uint32Array(chosen.length * text.tokens);
  for (let i = 0; i < chosen.length; i++) {
    const start = chosen[i] * text.tokens;
    out.set(text.ids.subarray(start, start + text.tokens), i * text.tokens);
  }
  return out;
}

/** Endless batches of all sequences, shuffled anew each time round. */
export function* batches(sequences: number, batch: number, seed: number): Generator<Uint32Array> {
  for (let round = 0;; round++) {
    const order = shuffled(sequences, seed + round * 7919);
    for (let at = 0; at + batch <= sequences; at += batch) yield order.subarray(at, at + batch);
  }
}
