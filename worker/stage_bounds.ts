/**
 * Whether a step fits the stage it is meant for. The codec makes sure that a frame agrees with
 * itself (every position has its page, say); this makes sure that it agrees with the stage, so that
 * no page, position or token id from the wire ever indexes past a buffer.
 *
 * @module
 */
import type { RowRequest, StepFrame } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import type { StageLimits } from "../shared/protocol.ts";

/** What a step is held against. */
export interface StageBounds {
  limits: StageLimits;
  config: Pick<ModelConfig, "hiddenSize" | "vocabSize">;
  /** The first stage takes token ids only, every other one activations too. */
  first: boolean;
}

/** What is wrong with a step for this stage, in words; null when nothing is. */
export function misfit(frame: StepFrame, { limits, config, first }: StageBounds): string | null {
  const { batch, hidden } = frame;
  const rows = batch.rowToken.length;
  if (rows > limits.maxRows) return `${rows} rows, at most ${limits.maxRows}`;
  if (batch.sequences.length > limits.maxSequences) {
    return `${batch.sequences.length} sequences, at most ${limits.maxSequences}`;
  }
  if (batch.requests.length > limits.maxOutputs) {
    return `${batch.requests.length} requests, at most ${limits.maxOutputs}`;
  }
  const values = hidden?.length ?? 0;
  if (values !== (first ? 0 : rows * config.hiddenSize)) {
    return `${values} activations for ${rows} rows`;
  }
  const longest = Math.ceil(limits.contextTokens / LIMITS.pageTokens);
  for (const { pages } of batch.sequences) {
    if (pages.length > longest) return `${pages.length} pages of a sequence, at most ${longest}`;
    for (const page of pages) if (page >= limits.pages) return `page ${page} of ${limits.pages}`;
  }
  for (let row = 0; row < rows; row++) {
    const position = batch.rowPosition[row];
    if (position >= limits.contextTokens) return `position ${position} of ${limits.contextTokens}`;
    if (batch.rowToken[row] >= config.vocabSize) return `token ${batch.rowToken[row]}`;
  }
  for (const request of batch.requests) {
    const token = largestToken(request);
    if (token >= config.vocabSize) return `token ${token} in a request`;
  }
  return null;
}

/** The largest token id that a request names; -1 for none. */
function largestToken(request: RowRequest): number {
  switch (request.type) {
    case "sample": {
      const { biasTokens, countTokens } = request.sampling;
      const larger = (most: number, token: number) => Math.max(most, token);
      return countTokens.reduce(larger, biasTokens.reduce(larger, -1));
    }
    case "score":
      return request.token;
    case "logits":
      return -1;
    default:
      return request satisfies never;
  }
}
