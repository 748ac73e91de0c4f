/**
 * Perplexity of a model over a text: how well it predicts each next token.
 *
 * @module
 */
import { FleetError, invariant } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import type { StageLimits } from "../shared/protocol.ts";
import { type ChainRow, type StageChain, stepBatch } from "./stage_chain.ts";

/** What is measured. */
export interface PerplexityOptions {
  /** Tokens that are predicted before the context starts anew. */
  windowTokens: number;
  /** Predicted tokens to stop at; by default all. */
  maxTokens?: number;
  onProgress?: (predicted: number, total: number) => void;
}

/** The result of {@linkcode perplexity}. */
export interface Perplexity {
  /** `exp` of the mean negative log-probability. */
  perplexity: number;
  /** Tokens that were predicted. */
  predicted: number;
}

/** Limits of a chain for {@linkcode perplexity}: every row of a step is scored. */
export function perplexityLimits(windowTokens: number): StageLimits {
  return {
    maxRows: LIMITS.maxOutputsPerStep,
    maxSequences: 1,
    maxOutputs: LIMITS.maxOutputsPerStep,
    pages: Math.ceil(windowTokens / LIMITS.pageTokens),
    contextTokens: windowTokens,
  };
}

/**
 * Measures perplexity in windows: each predicts `windowTokens` tokens and starts fresh at the one
 * before them, so that a window costs no other one's context.
 *
 * @param chain made with {@linkcode perplexityLimits}
 * @param tokens the text; the first is context only
 * @throws FleetError `bad-request` when there is nothing to predict
 */
export async function perplexity(
  chain: StageChain,
  tokens: ArrayLike<number>,
  { windowTokens, maxTokens = Infinity, onProgress }: PerplexityOptions,
): Promise<Perplexity> {
  const total = Math.min(tokens.length - 1, maxTokens);
  if (total < 1) throw new FleetError("bad-request", "There is no token to predict");
  const pages = [Uint32Array.from({ length: perplexityLimits(windowTokens).pages }, (_, i) => i)];
  let logprobs = 0;
  for (let window = 0; window < total; window += windowTokens) {
    const end = Math.min(window + windowTokens, total);
    for (let at = window; at < end; at += LIMITS.maxOutputsPerStep) {
      const rows: ChainRow[] = [];
      for (let i = at; i < Math.min(at + LIMITS.maxOutputsPerStep, end); i++) {
        rows.push({
          sequence: 0,
          position: i - window,
          token: tokens[i],
          request: { type: "score", token: tokens[i + 1] },
        });
      }
      const { results } = await chain.step(stepBatch(pages, rows, 0));
      for (const result of results) {
        invariant(result.type === "score", "a score is answered with a score");
        logprobs += result.logprob;
      }
      onProgress?.(at + rows.length, total);
    }
  }
  return { perplexity: Math.exp(-logprobs / total), predicted: total };
}
