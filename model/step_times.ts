/**
 * How long the GPU worked on steps of which kind: what tells how long it will on the next one.
 *
 * @module
 */
import type { TransformerShape } from "../kernels/transformer/mod.ts";

/** Kinds of steps that are remembered; decoding brings few, the least of all times serves the rest. */
const MOST_KINDS = 256;
/**
 * The least of as many times of a kind is believed. A step that was slow once (another process had the
 * GPU, its clock was low) must not make whoever waits for the next one oversleep.
 */
const LAST_TIMES = 4;
/** The next step of a kind takes at least this share of that time. */
const SURE_SHARE = 0.98;

/** GPU times of steps by their counts. */
export class StepTimes {
  /** The last times of each kind, youngest first. */
  readonly #lastMs = new Map<string, number[]>();
  #leastMs = Infinity;

  /**
   * The first step of a kind is taken note of, but its time is not believed: some drivers compile a
   * kernel when it is first run.
   *
   * @param counts as {@linkcode surelyMs} is asked for them: context lengths rounded alike
   */
  record(counts: TransformerShape, gpuMs: number): void {
    const kind = kindOf(counts);
    const lastMs = this.#lastMs.get(kind);
    this.#lastMs.delete(kind); // set anew it is the youngest
    if (this.#lastMs.size === MOST_KINDS) {
      for (const oldest of this.#lastMs.keys()) {
        this.#lastMs.delete(oldest);
        break;
      }
    }
    this.#lastMs.set(kind, lastMs ? [gpuMs, ...lastMs.slice(0, LAST_TIMES - 1)] : []);
    if (lastMs) this.#leastMs = Math.min(this.#leastMs, gpuMs);
  }

  /**
   * A time for which the GPU will surely work on a step. Of a kind that nothing is known of yet it is
   * the least of all times, for every step reads all weights; 0 when there are none.
   */
  surelyMs(counts: TransformerShape): number {
    const lastMs = this.#lastMs.get(kindOf(counts));
    const expectedMs = lastMs?.length ? Math.min(...lastMs) : this.#leastMs;
    return Number.isFinite(expectedMs) ? expectedMs * SURE_SHARE : 0;
  }
}

function kindOf(counts: TransformerShape): string {
  const { decodeRows, rows, prefillTiles, contextTokens, outputs } = counts;
  return `${decodeRows} ${rows} ${prefillTiles} ${contextTokens} ${outputs}`;
}
