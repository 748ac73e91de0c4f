/**
 * Where the time of steps goes, stage by stage: the last few hundred traces, and percentiles of them.
 *
 * @module
 */
import type { StageTrace } from "../shared/frames.ts";
import type { Percentiles, StageLatency } from "./snapshot.ts";

/** Steps remembered per stage. */
const WINDOW = 512;

/** The last {@linkcode WINDOW} values of one quantity. */
class Window {
  #values = new Float64Array(WINDOW);
  #count = 0;

  add(value: number): void {
    this.#values[this.#count++ % WINDOW] = value;
  }

  get size(): number {
    return Math.min(this.#count, WINDOW);
  }

  /** Nearest-rank percentiles; zeros when empty. */
  percentiles(): Percentiles {
    const sorted = this.#values.slice(0, this.size).sort();
    const at = (share: number) =>
      sorted.length === 0 ? 0 : sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
    return { p50: at(0.5), p95: at(0.95), p99: at(0.99) };
  }
}

/** How long a span of busy time counts for {@linkcode StageTimes.busy}. */
const BUSY_SPAN_MS = 5_000;

/** The times of one stage. */
class StageTimes {
  readonly wire = new Window();
  readonly queue = new Window();
  readonly gpu = new Window();
  readonly readback = new Window();
  readonly total = new Window();
  #recent: { atMs: number; gpuMs: number }[] = [];

  add(trace: StageTrace, wireMs: number, nowMs: number): void {
    const queueMs = Math.max(0, trace.startedAtMs - trace.receivedAtMs);
    this.wire.add(wireMs);
    this.queue.add(queueMs);
    this.gpu.add(trace.gpuMs);
    this.readback.add(trace.readbackMs);
    this.total.add(wireMs + Math.max(0, trace.sentAtMs - trace.receivedAtMs));
    this.#recent.push({ atMs: nowMs, gpuMs: trace.gpuMs });
    while (this.#recent.length > WINDOW) this.#recent.shift();
  }

  latency(): StageLatency {
    return {
      wire: this.wire.percentiles(),
      queue: this.queue.percentiles(),
      gpu: this.gpu.percentiles(),
      readback: this.readback.percentiles(),
      total: this.total.percentiles(),
      samples: this.total.size,
    };
  }

  /** Share of the last seconds the GPU worked; the span shrinks to what the window remembers. */
  busy(nowMs: number): number {
    const recent = this.#recent.filter((entry) => nowMs - entry.atMs < BUSY_SPAN_MS);
    if (recent.length === 0) return 0;
    const full = this.#recent.length < WINDOW || recent.length < this.#recent.length;
    const spanMs = full ? BUSY_SPAN_MS : nowMs - recent[0].atMs;
    const busyMs = recent.reduce((sum, entry) => sum + entry.gpuMs, 0);
    return spanMs > 0 ? Math.min(1, busyMs / spanMs) : 0;
  }
}

/**
 * Latencies of one plan.
 *
 * Workers stamp traces with their own clocks; `offsetsMs[i]` is how far stage i's clock runs ahead of
 * the coordinator's (see {@linkcode ClockOffset}), so that the wire's share can be told from them.
 */
export class PlanLatency {
  readonly #stages: StageTimes[];
  readonly #token = new Window();

  constructor(stages: number) {
    this.#stages = Array.from({ length: stages }, () => new StageTimes());
  }

  /**
   * Takes in a step's traces.
   *
   * @param issuedAtMs when the step was sent to stage 0, by the coordinator's clock
   * @param receivedAtMs when its result arrived, by the same clock
   * @param decodeOnly the step had no prefill rows: it counts as the latency of a token
   */
  add(
    traces: readonly StageTrace[],
    offsetsMs: readonly number[],
    issuedAtMs: number,
    receivedAtMs: number,
    decodeOnly: boolean,
  ): void {
    if (traces.length !== this.#stages.length || !traces.every(isPlausible)) return;
    let sentAtMs = issuedAtMs;
    for (const [i, trace] of traces.entries()) {
      const measuredMs = trace.receivedAtMs - offsetsMs[i] - sentAtMs;
      const wireMs = Math.min(LONGEST_SPAN_MS, Math.max(0, measuredMs));
      this.#stages[i].add(trace, wireMs, receivedAtMs);
      sentAtMs = trace.sentAtMs - offsetsMs[i];
    }
    if (decodeOnly) this.#token.add(receivedAtMs - issuedAtMs);
  }

  /** Null before the first step. */
  stage(index: number): StageLatency | null {
    const times = this.#stages[index];
    return times.total.size === 0 ? null : times.latency();
  }

  busy(index: number, nowMs: number): number {
    return this.#stages[index].busy(nowMs);
  }

  /** Median time of a decode step through the whole pipeline, ms; null before the first. */
  tokenMs(): number | null {
    return this.#token.size === 0 ? null : this.#token.percentiles().p50;
  }

  /** The slow end of a step's time through the pipeline, ms; null before the first. */
  slowTokenMs(): number | null {
    return this.#token.size === 0 ? null : this.#token.percentiles().p99;
  }
}

/** A worker whose clock jumps (or that lies) should not distort the figures for hundreds of steps. */
function isPlausible(
  { receivedAtMs, startedAtMs, gpuMs, readbackMs, sentAtMs }: StageTrace,
): boolean {
  const spans = [gpuMs, readbackMs, sentAtMs - receivedAtMs, Math.abs(startedAtMs - receivedAtMs)];
  return spans.every((ms) => ms >= 0 && ms < LONGEST_SPAN_MS);
}

const LONGEST_SPAN_MS = 60 * 60_000;

/** Samples of a round trip that are kept. */
const PINGS = 16;

/**
 * How far another machine's clock runs ahead of ours: of the last round trips the fastest one tells
 * best, for its two ways were the most alike (the clock filter of NTP, RFC 5905 section 10).
 */
export class ClockOffset {
  #samples: { roundTripMs: number; offsetMs: number }[] = [];

  /** @param sentAtMs @param receivedAtMs ours, around the round trip; @param theirMs theirs, within it */
  add(sentAtMs: number, receivedAtMs: number, theirMs: number): void {
    this.#samples.push({
      roundTripMs: receivedAtMs - sentAtMs,
      offsetMs: theirMs - (sentAtMs + receivedAtMs) / 2,
    });
    if (this.#samples.length > PINGS) this.#samples.shift();
  }

  /** 0 before the first sample. */
  get offsetMs(): number {
    return this.#best()?.offsetMs ?? 0;
  }

  /** Median round trip; null before the first sample. */
  get roundTripMs(): number | null {
    if (this.#samples.length === 0) return null;
    const sorted = this.#samples.map((sample) => sample.roundTripMs).sort((a, b) => a - b);
    return sorted[sorted.length >> 1];
  }

  #best() {
    return this.#samples.reduce<{ roundTripMs: number; offsetMs: number } | undefined>(
      (best, sample) => !best || sample.roundTripMs < best.roundTripMs ? sample : best,
      undefined,
    );
  }
}
