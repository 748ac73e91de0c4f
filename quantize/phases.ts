/**
 * Where the time of a block goes.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";

/**
 * What a block's time goes into: weights from disk to the GPU; the float layer over the text, with
 * Hessians; codes; steps of codebooks and scales; tuning of the whole block; the quantized layer over
 * the text; the finished block to disk.
 */
export const PHASES = [
  "read",
  "capture",
  "codes",
  "codebooks",
  "tuning",
  "outputs",
  "write",
] as const;
/** One of {@linkcode PHASES}. */
export type Phase = typeof PHASES[number];

/** Adds up the seconds of each phase. Laps of the GPU's work are taken when it has settled. */
export class Stopwatch {
  readonly seconds: Record<Phase, number>;
  readonly #clock: Clock;
  readonly #onTold?: (what: string, seconds: number) => void;
  #lapMs: number;
  #toldMs: number;

  /** @param onTold hears what was finished, and the seconds since it heard last */
  constructor(clock: Clock, onTold?: (what: string, seconds: number) => void) {
    this.seconds = Object.fromEntries(PHASES.map((phase) => [phase, 0])) as Record<Phase, number>;
    this.#clock = clock;
    this.#onTold = onTold;
    this.#lapMs = this.#toldMs = clock.nowMs();
  }

  /** The time since the last lap was this phase's. */
  lap(phase: Phase): void {
    const nowMs = this.#clock.nowMs();
    this.seconds[phase] += (nowMs - this.#lapMs) / 1000;
    this.#lapMs = nowMs;
  }

  /**
   * Something is finished that somebody who waits wants to hear of.
   *
   * @returns seconds since the last was
   */
  tell(what: string): number {
    const nowMs = this.#clock.nowMs();
    const seconds = (nowMs - this.#toldMs) / 1000;
    this.#onTold?.(what, seconds);
    this.#toldMs = nowMs;
    return seconds;
  }
}
