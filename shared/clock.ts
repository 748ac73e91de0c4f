/**
 * Time as an argument: everything that waits or measures takes a {@linkcode Clock}, so that tests
 * drive it and one seed replays any failure.
 *
 * @module
 */

/** A running timer; `cancel()` is idempotent. */
export interface Timer {
  cancel(): void;
}

/** Where time comes from. */
export interface Clock {
  /** Monotonic milliseconds, from an arbitrary zero. */
  nowMs(): number;
  /** Milliseconds since the Unix epoch. */
  unixMs(): number;
  /** Calls `fn` once, `delayMs` from now. */
  after(delayMs: number, fn: () => void): Timer;
}

/** The machine's clock. */
export const systemClock: Clock = {
  nowMs: () => performance.now(),
  unixMs: () => performance.timeOrigin + performance.now(),
  after(delayMs, fn) {
    const id = setTimeout(fn, delayMs);
    return { cancel: () => clearTimeout(id) };
  },
};

/** Resolves `delayMs` from now; rejects with the signal's reason when it aborts first. */
export function sleep(clock: Clock, delayMs: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const onAbort = () => {
      timer.cancel();
      reject(signal?.reason);
    };
    const timer = clock.after(delayMs, () => {
      signal?.removeEventListener("abort", onAbort);
      resolve();
    });
    signal?.addEventListener("abort", onAbort, { once: true });
  });
}

/**
 * A clock that moves only when told. Timers fire in the order of their due time, those of equal time
 * in the order they were set.
 *
 * @example
 * ```ts
 * import { VirtualClock } from "./clock.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const clock = new VirtualClock();
 * let fired = 0;
 * clock.after(10, () => fired++);
 * clock.advance(9);
 * assertEquals(fired, 0);
 * clock.advance(1);
 * assertEquals(fired, 1);
 * ```
 */
export class VirtualClock implements Clock {
  #nowMs = 0;
  #order = 0;
  #timers: { dueMs: number; order: number; fn: () => void }[] = [];
  readonly #unixStartMs: number;

  /** @param unixStartMs what {@linkcode unixMs} shows at time zero (31 December 2024 by default). */
  constructor(unixStartMs = Date.UTC(2024, 11, 31)) {
    this.#unixStartMs = unixStartMs;
  }

  nowMs(): number {
    return this.#nowMs;
  }

  unixMs(): number {
    return this.#unixStartMs + this.#nowMs;
  }

  after(delayMs: number, fn: () => void): Timer {
    const timer = { dueMs: this.#nowMs + Math.max(0, delayMs), order: this.#order++, fn };
    this.#timers.push(timer);
    return {
      cancel: () => {
        const at = this.#timers.indexOf(timer);
        if (at >= 0) this.#timers.splice(at, 1);
      },
    };
  }

  /** Fires every timer due in the next `deltaMs`, then stands there. */
  advance(deltaMs: number): void {
    const endMs = this.#nowMs + deltaMs;
    for (let next = this.#next(); next && next.dueMs <= endMs; next = this.#next()) {
      this.#fire(next);
    }
    this.#nowMs = endMs;
  }

  /** Jumps to the next timer and fires it; `false` when there is none. */
  step(): boolean {
    const next = this.#next();
    if (next) this.#fire(next);
    return next !== undefined;
  }

  #next() {
    return this.#timers.reduce<{ dueMs: number; order: number; fn: () => void } | undefined>(
      (best, timer) =>
        !best || timer.dueMs < best.dueMs ||
          (timer.dueMs === best.dueMs && timer.order < best.order)
          ? timer
          : best,
      undefined,
    );
  }

  #fire(timer: { dueMs: number; order: number; fn: () => void }): void {
    this.#timers.splice(this.#timers.indexOf(timer), 1);
    this.#nowMs = timer.dueMs;
    timer.fn();
  }
}
