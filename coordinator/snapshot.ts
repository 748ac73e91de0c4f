/**
 * A picture of the fleet at one moment: what `GET /fleet` answers, the page draws, `monitor` prints
 * and `/metrics` counts.
 *
 * @module
 */

/** Percentiles over the last few hundred steps, milliseconds. */
export interface Percentiles {
  p50: number;
  p95: number;
  p99: number;
}

/** Where the time of a step went at one stage. */
export interface StageLatency {
  /** From the previous sender's hands to this stage's (clock offsets taken out). */
  wire: Percentiles;
  /** Waiting for the GPU thread. */
  queue: Percentiles;
  gpu: Percentiles;
  readback: Percentiles;
  /** All of it. */
  total: Percentiles;
  /** Steps behind these figures. */
  samples: number;
}

/** A worker as the coordinator sees it. */
export interface WorkerSnapshot {
  worker: string;
  host: string;
  gpu: string;
  software: boolean;
  memoryBytes: number;
  /** Memory its stage takes: weights, pages, scratch; 0 without a stage. */
  usedBytes: number;
  state: "idle" | "loading" | "serving" | "failed" | "lost";
  /** Since its last beat, ms. */
  beatAgeMs: number;
  /** Median round trip of a control message, ms; null before the first. */
  roundTripMs: number | null;
  /** What it is doing or why it is left out, in a sentence. */
  note: string;
  /** Bytes loaded of the stage's parts, while loading. */
  progress: { doneBytes: number; totalBytes: number } | null;
  /** Frames it dropped, by reason. */
  dropped: Record<string, number>;
}

/** A stage of the current plan. */
export interface StageSnapshot {
  index: number;
  worker: string;
  from: number;
  to: number;
  first: boolean;
  last: boolean;
  latency: StageLatency | null;
  /** The planner's figure for one decode step, ms, beside the measured ones. */
  predictedMs: number;
  /** Share of the last seconds its GPU was busy, 0 to 1. */
  busy: number | null;
}

/** Something that happened, newest first. */
export interface FleetEvent {
  atUnixMs: number;
  level: "info" | "warning" | "error";
  text: string;
}

/** The fleet at one moment. */
export interface FleetSnapshot {
  model: {
    id: string;
    layers: number;
    bytes: number;
    format: string;
    /** The kernel family of 8-bit codes; null where nothing is quantized. */
    decode: string | null;
  };
  nowUnixMs: number;
  /** `waiting`: no plan; `loading`: weights on their way; `serving`; `failed`. */
  state: "waiting" | "loading" | "serving" | "failed";
  /** Why, in a sentence. */
  note: string;
  plan: {
    epoch: number;
    attempt: number;
    stages: StageSnapshot[];
    /** Latency of one token through the empty pipeline, ms. */
    predictedTokenMs: number;
    measuredTokenMs: number | null;
    /** Tokens per second of the full pipeline. */
    predictedTokensPerSecond: number;
    explanation: string[];
  } | null;
  workers: WorkerSnapshot[];
  load: {
    running: number;
    waiting: number;
    pagesUsed: number;
    pages: number;
    stepsInFlight: number;
    tokensPerSecond: number;
    tokensTotal: number;
    sequencesTotal: number;
    preemptionsTotal: number;
    reissuesTotal: number;
  };
  /** Frames and messages that the coordinator did not take, by reason, since its start. */
  dropped: Record<string, number>;
  events: FleetEvent[];
}
