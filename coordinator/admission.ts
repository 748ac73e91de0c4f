/**
 * Whether a pipeline can ever run a sequence to its end.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import { pagesFor } from "./kv_allocator.ts";
import { hasPenalties, type Sequence } from "./sequence.ts";
import type { StepBounds } from "./step_builder.ts";

/**
 * Why a sequence could never run, even with the pipeline to itself; null when it can.
 *
 * @param contextTokens the longest sequence that the pipeline holds
 */
export function reasonItCannotRun(
  sequence: Sequence,
  contextTokens: number,
  bounds: StepBounds,
): FleetError | null {
  const { tokens, request } = sequence;
  if (tokens.length >= contextTokens) {
    return new FleetError(
      "too-large",
      `The prompt has ${tokens.length} tokens, and the context holds ${contextTokens} with the ` +
        "answer; shorten the prompt",
    );
  }
  // The largest frame that a single row of it can need, at the end of its life.
  const generated = Math.min(request.maxTokens, contextTokens - request.promptTokens.length);
  const bytes = bounds.frameBytes({
    rows: 1,
    sequences: 1,
    pageEntries: pagesFor(contextTokens),
    requests: 1,
    biasEntries: request.bias.size,
    countEntries: hasPenalties(request) ? Math.min(generated, LIMITS.maxCountEntries) : 0,
  });
  if (bytes <= bounds.maxFrameBytes) return null;
  return new FleetError(
    "too-large",
    `One token of this request takes a frame of up to ${bytes} bytes, and ` +
      `${bounds.maxFrameBytes} fit; send a smaller logit_bias or max_tokens`,
    { param: "logit_bias" },
  );
}
