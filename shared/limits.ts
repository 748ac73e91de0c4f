/**
 * Every bound of the fleet, in one place, with the relations between them asserted.
 *
 * @module
 */
import { invariant } from "./errors.ts";

const KiB = 1024;
const MiB = 1024 * KiB;

/** Bounds. Units are in the names; what happens at a bound is said beside it. */
export const LIMITS = {
  /** Positions in a KV page. Part of the numerics: attention splits the context at page bounds. */
  pageTokens: 32,

  // ── Steps ────────────────────────────────────────────────────────────────────────────────────
  /** Rows of a step, whatever the frame could carry; the planner lowers it per model. */
  maxRowsPerStep: 256,
  /** Sequences named in one step. */
  maxSequencesPerStep: 64,
  /** Rows of a step that sample, score or return logits. */
  maxOutputsPerStep: 64,
  /** Steps in flight per stage: one running, one queued. */
  maxStepsInFlightPerStage: 2,
  /** Frames a stage holds before it drops (and reports a gap): two attempts of a full pipeline. */
  maxQueuedFramesPerStage: 64,
  /** Stages of one pipeline. */
  maxStages: 128,
  /** Alternatives returned beside a sampled token (OpenAI allows 20). */
  maxAlternatives: 20,
  /** Entries of `logit_bias` in a request (OpenAI's own bound is 300). */
  maxBiasEntries: 300,
  /** Distinct tokens whose counts a row may carry for penalties. */
  maxCountEntries: 8192,
  /** Tokens that bias and penalties may name in all rows of a step together. */
  maxAdjustmentsPerStep: 131_072,

  // ── Workers ──────────────────────────────────────────────────────────────────────────────────
  /** Workers of a fleet, those lost lately too; one more is refused. */
  maxWorkers: 256,
  /** Reasons for dropped frames that a worker may count in its beats. */
  maxDropReasons: 32,

  // ── Frames and messages ──────────────────────────────────────────────────────────────────────
  /** A frame on the wire, and the `max_payload` the fleet expects of NATS. */
  maxFrameBytes: 1 * MiB,
  /** A JSON control message. */
  maxControlBytes: 256 * KiB,
  /** A shard of a model part in the object store. */
  maxShardBytes: 32 * MiB,
  /** Shards in flight of one transfer. */
  maxShardsInFlight: 2,

  // ── Checkpoints ──────────────────────────────────────────────────────────────────────────────
  /** `config.json` and its small neighbours; travels inside a control message. */
  maxConfigBytes: 128 * KiB,
  /** `tokenizer.json` (Llama 3's has 9 MiB), the chat template, the index of shards. */
  maxTokenizerBytes: 128 * MiB,
  /** The JSON header of a safetensors file; the format's own bound is 100 MB. */
  maxSafetensorsHeaderBytes: 100e6,

  // ── API ──────────────────────────────────────────────────────────────────────────────────────
  maxBodyBytes: 4 * MiB,
  maxStopStrings: 4,
  maxStopStringBytes: 1 * KiB,
  maxChoices: 16,
  maxPromptsPerRequest: 64,
  /** Sequences waiting or running; past it the API answers 429 with `Retry-After`. */
  maxQueuedSequences: 1024,
  /** Server-sent event streams of the monitor page. */
  maxMonitorStreams: 64,

  // ── Time ─────────────────────────────────────────────────────────────────────────────────────
  beatEveryMs: 100,
  /** A worker without a beat for this long is dead. */
  deadAfterMs: 700,
  /** A control request without an answer. */
  controlTimeoutMs: 5_000,
  /** A step without a result raises the attempt; grows with the pipeline's measured latency. */
  stepDeadlineMs: 2_000,
  /** Attempts of one step before its pipeline is given up. */
  maxAttempts: 8,
  /** A canary token, when the fleet is idle, for `/readyz`. */
  canaryEveryMs: 5_000,
  readyWithinMs: 5_000,
} as const;

invariant(LIMITS.maxOutputsPerStep <= LIMITS.maxRowsPerStep, "every output belongs to a row");
invariant(LIMITS.maxSequencesPerStep <= LIMITS.maxRowsPerStep, "every sequence brings a row");
invariant(LIMITS.deadAfterMs >= 3 * LIMITS.beatEveryMs, "one lost beat is not a death");
invariant(LIMITS.maxControlBytes <= LIMITS.maxFrameBytes, "control messages fit a frame");
invariant(
  LIMITS.maxAdjustmentsPerStep * 8 >= LIMITS.maxFrameBytes,
  "a frame of (token, value) pairs fits the sampler",
);
