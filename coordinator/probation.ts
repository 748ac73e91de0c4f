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
/** A failure is none: a pipeline that works would stop for as long as the next attempt takes. */
const STRIKES_OF_A_FAILURE = 2;
const LONGEST_EXCLUSION_MS = 15 * 60_000;
const LONGEST_PROBATION_MS = 60 * 60_000;
/** A name without a strike for this long has a clean slate. */
const FORGIVEN_AFTER_MS = 3 * 60 * 60_000;

interface Entry {
  failures: number;
  strikes: number;
  lastStrikeMs: number;
  excluded: { instance: string; reason: string; untilMs: number } | null;
  /** {@linkcode Probation.tick} has something to tell at this time; null when it has told. */
  dueMs: number | null;
}

/** What befell workers, by their names. */
export class Probation {
  #entries = new Map<string, Entry>();

  /** A process failed to serve. @returns how long it is left out, ms */
  failed(worker: string, instance: string, reason: string, nowMs: number): number {
    const entry = this.#strike(worker, STRIKES_OF_A_FAILURE, nowMs);
    const forMs = Math.min(LONGEST_EXCLUSION_MS, FIRST_EXCLUSION_MS * 2 ** entry.failures++);
    entry.excluded = { instance, reason, untilMs: nowMs + forMs };
    entry.dueMs = Math.max(entry.excluded.untilMs, this.#steadyAtMs(entry));
    return forMs;
  }

  /** A worker went away without a word while it had a stage. */
  lost(worker: string, nowMs: number): void {
    const entry = this.#strike(worker, 1, nowMs);
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

  #strike(worker: string, strikes: number, nowMs: number): Entry {
    let entry = this.#entries.get(worker);
    if (!entry) {
      entry = { failures: 0, strikes: 0, lastStrikeMs: nowMs, excluded: null, dueMs: null };
      this.#entries.set(worker, entry);
    }
    entry.strikes += strikes;
    entry.lastStrikeMs = nowMs;
    return entry;
  }

  #steadyAtMs({ strikes, lastStrikeMs }: Entry): number {
    if (strikes < 2) return lastStrikeMs;
    const forMs = FIRST_PROBATION_MS * 2 ** Math.min(strikes - 2, 20);
    return lastStrikeMs + Math.min(LONGEST_PROBATION_MS, forMs);
  }
}
