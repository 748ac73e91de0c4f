/**
 * How far workers can be relied on. Pure: what befell them and the time go in, who is left out of
 * plans comes out.
 *
 * - A process that *failed* (it refused, could not load, stopped computing) is left out of every plan
 *   for a while, twice as long each time its name fails again.
 * - A worker that keeps failing or going away is *on probation*: it may serve where it is needed, but
 *   a pipeline that works is not torn down to take it in.
 *
 * @module
 */

/** A process that failed is tried again after this; doubles with every failure. */
const FIRST_EXCLUSION_MS = 30_000;
/** Probation after the second strike; doubles with every other. The first strike is an accident. */
const FIRST_PROBATION_MS = 30_000;
const LONGEST_MS = 15 * 60_000;
/** A name without a strike for this long has a clean slate. */
const FORGIVEN_AFTER_MS = 60 * 60_000;

interface Entry {
  failures: number;
  strikes: number;
  lastStrikeMs: number;
  excluded: { instance: string; reason: string; untilMs: number } | null;
  /** {@linkcode Probation.tick} has something to tell at this time; null when it has told. */
  dueMs: number | null;
}

/** Strikes, by the names of workers. */
export class Probation {
  #entries = new Map<string, Entry>();

  /** A process failed to serve. @returns how long it is left out, ms */
  failed(worker: string, instance: string, reason: string, nowMs: number): number {
    const entry = this.#strike(worker, nowMs);
    const forMs = doubled(FIRST_EXCLUSION_MS, entry.failures++);
    entry.excluded = { instance, reason, untilMs: nowMs + forMs };
    entry.dueMs = Math.max(entry.excluded.untilMs, this.#steadyAtMs(entry));
    return forMs;
  }

  /** A worker went away without a word while it had a stage. */
  lost(worker: string, nowMs: number): void {
    const entry = this.#strike(worker, nowMs);
    entry.dueMs = Math.max(entry.excluded?.untilMs ?? 0, this.#steadyAtMs(entry));
  }

  /** Why this process is left out of plans now; null when it is not. */
  exclusion(worker: string, instance: string, nowMs: number): string | null {
    const excluded = this.#entries.get(worker)?.excluded;
    return excluded?.instance === instance && nowMs < excluded.untilMs ? excluded.reason : null;
  }

  /** Whether a pipeline that works should take it in. */
  isSteady(worker: string, nowMs: number): boolean {
    const entry = this.#entries.get(worker);
    return !entry || nowMs >= this.#steadyAtMs(entry);
  }

  /** Time passes. @returns whether somebody may be tried again since the last call */
  tick(nowMs: number): boolean {
    let due = false;
    for (const [worker, entry] of this.#entries) {
      if (entry.excluded && nowMs >= entry.excluded.untilMs) {
        entry.excluded = null;
        due = true;
      }
      if (entry.dueMs !== null && nowMs >= entry.dueMs) {
        entry.dueMs = null;
        due = true;
      }
      if (nowMs - entry.lastStrikeMs >= FORGIVEN_AFTER_MS) this.#entries.delete(worker);
    }
    return due;
  }

  #strike(worker: string, nowMs: number): Entry {
    let entry = this.#entries.get(worker);
    if (!entry) {
      entry = { failures: 0, strikes: 0, lastStrikeMs: nowMs, excluded: null, dueMs: null };
      this.#entries.set(worker, entry);
    }
    entry.strikes++;
    entry.lastStrikeMs = nowMs;
    return entry;
  }

  #steadyAtMs({ strikes, lastStrikeMs }: Entry): number {
    return strikes < 2 ? lastStrikeMs : lastStrikeMs + doubled(FIRST_PROBATION_MS, strikes - 2);
  }
}

function doubled(firstMs: number, times: number): number {
  return Math.min(LONGEST_MS, firstMs * 2 ** Math.min(times, 20));
}
