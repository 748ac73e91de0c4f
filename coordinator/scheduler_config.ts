/**
 * A plan's bounds in the scheduler's words.
 *
 * @module
 */
import { stepFrameBytes } from "../shared/codec.ts";
import { LIMITS } from "../shared/limits.ts";
import type { Plan } from "./planner.ts";
import type { SchedulerConfig } from "./scheduler.ts";

/**
 * Rows of a step that catch up (prefill, replay): what decoding sequences then wait for stays small,
 * and the prefill kernels still get whole tiles.
 */
const PREFILL_ROWS = 128;

/**
 * @param hiddenSize elements of a row's activations
 * @param maxPayloadBytes the largest message of the bus
 */
export function schedulerConfig(
  { stages, limits }: Pick<Plan, "stages" | "limits">,
  hiddenSize: number,
  maxPayloadBytes: number,
): SchedulerConfig {
  return {
    stages: stages.length,
    maxStepsInFlight: stages.length * LIMITS.maxStepsInFlightPerStage,
    maxRows: limits.maxRows,
    maxSequencesPerStep: limits.maxSequences,
    maxOutputs: limits.maxOutputs,
    prefillRowsPerStep: Math.min(PREFILL_ROWS, limits.maxRows),
    pages: limits.pages,
    contextTokens: limits.contextTokens,
    maxQueuedSequences: LIMITS.maxQueuedSequences,
    maxFrameBytes: Math.min(LIMITS.maxFrameBytes, maxPayloadBytes),
    frameBytes: (shape) => stepFrameBytes({ ...shape, hiddenSize, stages: stages.length }),
  };
}
