/**
 * What a stage is and what a step through it yields: the types between {@linkcode StageModel} (in
 * `stage_model.ts`) and whoever feeds it.
 *
 * @module
 */
import type { Matrix, Variant } from "../kernels/linear/mod.ts";
import type { RowResult, StepBatch } from "../shared/frames.ts";
import type { ModelConfig, PartName } from "../shared/model_config.ts";
import type { NumericsProfile, StageLimits } from "../shared/protocol.ts";

/** A run of consecutive layers, and the bounds its buffers are made for. */
export interface StageSpec {
  config: ModelConfig;
  /** Layers `[from, to)`. */
  from: number;
  to: number;
  /** The first stage also embeds. */
  first: boolean;
  /** The last stage also norms, projects to the vocabulary and answers the rows' requests. */
  last: boolean;
  limits: StageLimits;
  profile: NumericsProfile;
  /** The kernel variant of each matrix, where autotuning chose one; it changes no bit of a result. */
  variants?: (matrix: Matrix) => Partial<Variant>;
  /** The key of each part in the {@linkcode WeightStore}, its digest say; by default its name. */
  parts?: ReadonlyMap<PartName, string>;
}

/** How far the making of a stage is. */
export interface StageProgress {
  /** What is being made: "layer 3 of 8", "kernels of the output head". */
  what: string;
  done: number;
  total: number;
}

/** A submitted step. Tickets are finished in the order they were submitted in. */
export interface Ticket {
  /** Grows by one with every submitted step. */
  readonly id: number;
}

/** What a step yields. */
export interface StageOutput {
  /** float16 bits `(rows, hiddenSize)` for the next stage; null from the last one. */
  hidden: Uint16Array<ArrayBuffer> | null;
  /** One per request of the batch, in its order; empty except from the last stage. */
  results: RowResult[];
  /** GPU time of the step's kernels, or the wall time of the wait where that cannot be asked. */
  gpuMs: number;
  /** Wall time of fetching the outputs once the GPU was done. */
  readbackMs: number;
  /** From the end of the step before to the beginning of this one, by the GPU's own clock. */
  gpuIdleMs?: number;
}

/** A stage that runs steps: what {@linkcode StageModel} offers, as an interface for stand-ins. */
export interface StageSteps {
  /** Bytes of GPU memory it holds: weights, pages, scratch, staging. */
  readonly memoryBytes: number;
  /**
   * Checks a batch against the stage's limits and queues it: it runs as soon as the step before it is
   * done. Returns at once. At most `LIMITS.maxStepsInFlightPerStage` steps may be unfinished.
   *
   * @param hidden float16 bits `(rows, hiddenSize)` of the previous stage; null for the first stage
   * @throws FleetError `bad-frame` before anything is touched
   */
  submit(batch: StepBatch, hidden: Uint16Array | null): Ticket;
  /** Encodes ahead what the next step will likely bring; does that while the GPU works. */
  prepare(): void;
  /**
   * Lets go of what the GPU has done of a step so far, which costs time that would otherwise be lost
   * at the step's end; nothing is done twice. Call it now and then while the GPU works.
   */
  settle(): void;
  /**
   * How long the GPU will surely still work on the oldest unfinished step, judged by earlier steps of
   * the same counts; 0 or less when nothing is known, or its end is near. Whoever has better things
   * to do than to block in {@linkcode finish} does them meanwhile.
   */
  busyForMs(): number;
  /**
   * Waits for the oldest unfinished step, starts the one queued behind it, and fetches the outputs.
   * Blocks its thread meanwhile.
   *
   * @throws FleetError `gpu` when the device failed at any time since it was opened: fatal
   */
  finish(ticket: Ticket): Promise<StageOutput>;
  /** Frees pages and scratch; weights stay in the store. Idempotent. */
  destroy(): void;
}
