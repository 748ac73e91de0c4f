/**
 * Live snapshots for many watchers at the price of one.
 *
 * @module
 */
import type { Clock, Timer } from "../../shared/clock.ts";
import { FleetError } from "../../shared/errors.ts";
import { LIMITS } from "../../shared/limits.ts";
import type { Engine } from "../engine.ts";

/** Changes that follow each other faster than this are shown together. */
const MIN_GAP_MS = 250;
/** Without a change a snapshot goes out this often: ages and rates move by themselves. */
const REFRESH_MS = 1_000;

interface Watcher {
  /** The newest snapshot not yet taken; older ones are dropped for a slow reader. */
  latest: string | null;
  wake: () => void;
}

/** Follows the engine while somebody watches; each snapshot is turned into JSON once. */
export class SnapshotFeed {
  readonly #engine: Pick<Engine, "snapshot" | "onChange">;
  readonly #clock: Clock;
  readonly #maxWatchers: number;
  readonly #watchers = new Set<Watcher>();
  #stopListening = () => {};
  #timer: Timer | null = null;
  #dueMs = 0;
  #lastMs = -Infinity;

  constructor(
    engine: Pick<Engine, "snapshot" | "onChange">,
    clock: Clock,
    maxWatchers: number = LIMITS.maxMonitorStreams,
  ) {
    this.#engine = engine;
    this.#clock = clock;
    this.#maxWatchers = maxWatchers;
  }

  /**
   * Snapshots as JSON, the first at once, until `signal` aborts.
   *
   * @throws FleetError `overloaded` when all places are taken
   */
  follow(signal: AbortSignal): AsyncGenerator<string> {
    if (this.#watchers.size >= this.#maxWatchers) {
      const message =
        `${this.#maxWatchers} monitors are watching already; close one, or poll /fleet`;
      throw new FleetError("overloaded", message);
    }
    const watcher: Watcher = { latest: this.#json(), wake: () => {} };
    this.#watchers.add(watcher);
    if (this.#watchers.size === 1) this.#start();
    const leave = () => {
      this.#watchers.delete(watcher);
      if (this.#watchers.size === 0) this.#stop();
      watcher.wake();
    };
    if (signal.aborted) leave();
    signal.addEventListener("abort", leave, { once: true });
    return this.#follow(watcher);
  }

  async *#follow(watcher: Watcher): AsyncGenerator<string> {
    while (this.#watchers.has(watcher)) {
      const json = watcher.latest;
      watcher.latest = null;
      if (json !== null) yield json;
      else await new Promise<void>((resolve) => watcher.wake = resolve);
    }
  }

  #start(): void {
    this.#stopListening = this.#engine.onChange(() =>
      this.#publishAt(Math.max(this.#clock.nowMs(), this.#lastMs + MIN_GAP_MS))
    );
    this.#publishAt(this.#clock.nowMs() + REFRESH_MS);
  }

  #stop(): void {
    this.#stopListening();
    this.#timer?.cancel();
    this.#timer = null;
  }

  #publishAt(atMs: number): void {
    if (this.#timer !== null && this.#dueMs <= atMs) return;
    this.#timer?.cancel();
    this.#dueMs = atMs;
    this.#timer = this.#clock.after(Math.max(0, atMs - this.#clock.nowMs()), () => this.#publish());
  }

  #publish(): void {
    const json = this.#json();
    this.#timer = null;
    for (const watcher of this.#watchers) {
      watcher.latest = json;
      watcher.wake();
    }
    this.#publishAt(this.#clock.nowMs() + REFRESH_MS);
  }

  #json(): string {
    this.#lastMs = this.#clock.nowMs();
    return JSON.stringify(this.#engine.snapshot());
  }
}
