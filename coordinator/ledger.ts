/**
 * The unfinished steps of one epoch, and the attempts at them. Pure: time is an argument.
 *
 * Results are taken strictly in the order of the steps, one per step, so the unfinished steps are
 * always a run of consecutive numbers, and "every unfinished step, unchanged and in order" is what
 * stages expect of a new attempt: `attemptBase`, `attemptBase + 1`, and so on. A result that
 * overtakes a missing one shows that the missing one is lost.
 *
 * A result of an older attempt of the same epoch is as good as one of the current attempt: the same
 * rows over the same pages give the same bits.
 *
 * @module
 */
import { FleetError, invariant } from "../shared/errors.ts";
import type { FrameOrder } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";

/** What {@linkcode Ledger.accept} made of a result. */
export type Verdict<T> =
  /** It completes its step, which was issued `latencyMs` ago (this attempt or an earlier one). */
  | { type: "accepted"; step: T; latencyMs: number }
  /** The step has its result already. */
  | { type: "duplicate" }
  /** Of another epoch, or of a step or attempt that was never issued. */
  | { type: "stale" }
  /** It overtook the result of an earlier step, which is lost: raise the attempt. */
  | { type: "gap" }
  /** It overtook an earlier step's result, but belongs to an attempt that was given up anyway. */
  | { type: "early" };

/** A step with the order it is (re)issued under. */
export interface IssuedStep<T> {
  order: FrameOrder;
  step: T;
}

/** What to do about a gap or a deadline. */
export type Reissue<T> =
  | { type: "reissue"; attempt: number; steps: IssuedStep<T>[] }
  /** A step went through all its attempts: the pipeline does not work. */
  | { type: "failed"; error: FleetError };

/** Bounds of a ledger; {@linkcode LIMITS} by default. */
export interface LedgerOptions {
  stepDeadlineMs?: number;
  maxAttempts?: number;
}

interface Unfinished<T> {
  step: T;
  firstAttempt: number;
  issuedAtMs: number;
}

/** A step that is slower than this many times the usual is taken for lost. */
const DEADLINE_LATENCIES = 4;
/** The time allowed doubles this often at most: a pipeline that is dead should not take an hour. */
const MOST_DOUBLINGS = 3;
/** Attempts that reported gaps raise are at least this far apart, ms. */
const MIN_GAP_SPACING_MS = 20;
/** Weight of the newest latency in the running mean. */
const LATENCY_WEIGHT = 0.1;

/**
 * The steps of one epoch of one pipeline that have no result yet.
 *
 * @example
 * ```ts
 * import { Ledger } from "./ledger.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const ledger = new Ledger<string>(7);
 * const first = ledger.issue(1, "one", 0);
 * const second = ledger.issue(2, "two", 0);
 * assertEquals(ledger.accept(second, 5).type, "gap"); // the result of step 1 is lost
 * const again = ledger.raise(5);
 * assertEquals(again.type === "reissue" && again.steps.map(({ step }) => step), ["one", "two"]);
 * assertEquals(ledger.accept(first, 6).type, "accepted"); // late, but right
 * ```
 */
export class Ledger<T> {
  readonly epoch: number;
  readonly #stepDeadlineMs: number;
  readonly #maxAttempts: number;
  /** Oldest first: step number `#base + i` at index `i`. */
  #unfinished: Unfinished<T>[] = [];
  #base = 1;
  #attempt = 1;
  #attemptBase = 1;
  /** Attempts given up since a step last completed. */
  #barren = 0;
  #progressAtMs = 0;
  #raisedAtMs = -Infinity;
  #meanLatencyMs = 0;
  #reissues = 0;

  constructor(epoch: number, options: LedgerOptions = {}) {
    this.epoch = epoch;
    this.#stepDeadlineMs = options.stepDeadlineMs ?? LIMITS.stepDeadlineMs;
    this.#maxAttempts = options.maxAttempts ?? LIMITS.maxAttempts;
  }

  get attempt(): number {
    return this.#attempt;
  }

  /** Steps without a result. */
  get size(): number {
    return this.#unfinished.length;
  }

  /** Steps that were sent again, summed over all attempts. */
  get reissues(): number {
    return this.#reissues;
  }

  /** Running mean of the time from a step's last issue to its result; 0 before the first. */
  get meanLatencyMs(): number {
    return this.#meanLatencyMs;
  }

  /** Enters the next step. @returns the order to send it under */
  issue(number: number, step: T, nowMs: number): FrameOrder {
    invariant(
      number === this.#base + this.#unfinished.length,
      `step ${number} is issued where ${this.#base + this.#unfinished.length} comes next`,
    );
    if (this.#unfinished.length === 0) this.#progressAtMs = nowMs;
    this.#unfinished.push({ step, firstAttempt: this.#attempt, issuedAtMs: nowMs });
    return this.#order(number);
  }

  /** Judges a result that came in. */
  accept(order: FrameOrder, nowMs: number): Verdict<T> {
    const next = this.#base + this.#unfinished.length;
    if (order.epoch !== this.epoch || order.attempt > this.#attempt || order.step >= next) {
      return { type: "stale" };
    }
    if (order.step < this.#base) return { type: "duplicate" };
    const wanted = this.#unfinished[order.step - this.#base];
    if (order.attempt < wanted.firstAttempt) return { type: "stale" };
    if (order.step > this.#base) {
      return { type: order.attempt === this.#attempt ? "gap" : "early" };
    }
    this.#unfinished.shift();
    this.#base++;
    this.#barren = 0;
    this.#progressAtMs = nowMs;
    const latencyMs = nowMs - wanted.issuedAtMs;
    this.#meanLatencyMs = this.#meanLatencyMs === 0
      ? latencyMs
      : this.#meanLatencyMs + LATENCY_WEIGHT * (latencyMs - this.#meanLatencyMs);
    return { type: "accepted", step: wanted.step, latencyMs };
  }

  /** Whether a gap that a stage reports calls for a new attempt; one of an older attempt does not. */
  isCurrent(report: { epoch: number; attempt: number }): boolean {
    return report.epoch === this.epoch && report.attempt === this.#attempt && this.size > 0;
  }

  /**
   * When a gap may raise the attempt: the first at once, then no sooner than twice the pipeline's usual
   * latency after the last attempt, and twice as long after each that brought nothing. So whoever
   * reports gaps without end makes steps slower, but keeps none from completing.
   */
  get gapHeardMs(): number {
    const spacingMs = Math.max(MIN_GAP_SPACING_MS, this.#meanLatencyMs);
    return this.#raisedAtMs + spacingMs * 2 ** Math.min(this.#barren, MOST_DOUBLINGS);
  }

  /**
   * When the oldest step is overdue; null when nothing is in flight.
   *
   * The time allowed grows with the pipeline's usual latency, and doubles with every attempt that
   * brought nothing: a pipeline that is merely slow must not be started over for ever.
   */
  get deadlineMs(): number | null {
    if (this.#unfinished.length === 0) return null;
    const allowed = Math.max(this.#stepDeadlineMs, DEADLINE_LATENCIES * this.#meanLatencyMs);
    const since = Math.max(this.#unfinished[0].issuedAtMs, this.#progressAtMs);
    return since + allowed * 2 ** Math.min(this.#barren, MOST_DOUBLINGS);
  }

  /** Whether the oldest step is overdue: then {@linkcode raise}. */
  expired(nowMs: number): boolean {
    const { deadlineMs } = this;
    return deadlineMs !== null && nowMs >= deadlineMs;
  }

  /** Starts a new attempt at every unfinished step. */
  raise(nowMs: number): Reissue<T> {
    invariant(this.#unfinished.length > 0, "there is something to reissue");
    // Attempts at which later steps waited behind earlier ones do not count against them.
    const attempts = this.#barren + 1;
    if (attempts >= this.#maxAttempts) {
      const message = `Step ${this.#base} brought no result in ${attempts} attempts`;
      return { type: "failed", error: new FleetError("unavailable", message) };
    }
    this.#attempt++;
    this.#raisedAtMs = nowMs;
    this.#attemptBase = this.#base;
    this.#barren++;
    this.#reissues += this.#unfinished.length;
    const steps = this.#unfinished.map((unfinished, index) => {
      unfinished.issuedAtMs = nowMs;
      return { order: this.#order(this.#base + index), step: unfinished.step };
    });
    return { type: "reissue", attempt: this.#attempt, steps };
  }

  #order(step: number): FrameOrder {
    return { epoch: this.epoch, attempt: this.#attempt, attemptBase: this.#attemptBase, step };
  }
}
