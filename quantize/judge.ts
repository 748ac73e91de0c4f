/**
 * How well a model predicts a text, and how far its predictions are from another model's.
 *
 * @module
 */
import { FleetError, invariant } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import { type ChainRow, perplexityLimits, type StageChain, stepBatch } from "../model/mod.ts";

/** What is measured. */
export interface JudgeOptions {
  /** Tokens that are predicted before the context starts anew. */
  windowTokens: number;
  /** Predicted tokens to stop at; by default all. */
  maxTokens?: number;
  onProgress?: (predicted: number, total: number) => void;
}

/** How a model did over a text. */
export interface Judgement {
  /** `exp` of the mean negative log-probability. */
  perplexity: number;
  /** Tokens that were predicted. */
  predicted: number;
  /** Share of positions where model and reference hold the same token likeliest. */
  agreement: number;
  /** Mean over positions of `KL(reference || model)`, in nats. */
  divergence: number;
}

/** A row of logits with what its log-probabilities need: `log p = logit - shift`. */
interface Prediction {
  logits: Float32Array;
  /** `log(sum(exp(logits)))` */
  shift: number;
  /** The likeliest token, the lowest id of equals. */
  top: number;
}

/** Looks at a row of logits. */
export function predictionOf(logits: Float32Array): Prediction {
  let top = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[top]) top = i;
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i] - logits[top]);
  return { logits, shift: logits[top] + Math.log(sum), top };
}

/** `KL(p || q)` in nats. */
export function divergenceOf(p: Prediction, q: Prediction): number {
  const shift = q.shift - p.shift;
  let sum = 0;
  for (let i = 0; i < p.logits.length; i++) {
    const logit = p.logits[i];
    sum += Math.exp(logit - p.shift) * (logit - q.logits[i] + shift);
  }
  return sum;
}

/**
 * Judges a model against a reference of the same vocabulary. Windows are as in `perplexity()`: each
 * predicts `windowTokens` tokens and starts fresh at the one before them.
 *
 * @param model made with `perplexityLimits()`, and so `reference`
 * @param tokens the text; the first is context only
 * @throws FleetError `bad-request` when there is nothing to predict
 */
export async function judge(
  model: StageChain,
  reference: StageChain,
  tokens: ArrayLike<number>,
  vocabSize: number,
  { windowTokens, maxTokens = Infinity, onProgress }: JudgeOptions,
): Promise<Judgement> {
  const total = Math.min(tokens.length - 1, maxTokens);
  if (total < 1) throw new FleetError("bad-request", "There is no token to predict");
  // Rows of logits are read back as far as they fit a frame.
  const stepRows = Math.min(
    LIMITS.maxOutputsPerStep,
    Math.floor(LIMITS.maxFrameBytes / (4 * vocabSize)),
  );
  const pages = [Uint32Array.from({ length: perplexityLimits(windowTokens).pages }, (_, i) => i)];
  let loss = 0, agreed = 0, divergence = 0;
  for (let window = 0; window < total; window += windowTokens) {
    const end = Math.min(window + windowTokens, total);
    for (let at = window; at < end; at += stepRows) {
      const rows = Array.from({ length: Math.min(stepRows, end - at) }, (_, i): ChainRow => ({
        sequence: 0,
        position: at + i - window,
        token: tokens[at + i],
        request: { type: "logits" },
      }));
      const step = async (chain: StageChain) =>
        (await chain.step(stepBatch(pages, rows, 0))).results.map((result) => {
          invariant(result.type === "logits", "logits are answered with logits");
          return predictionOf(result.logits);
        });
      const [ours, theirs] = [await step(model), await step(reference)];
      for (let i = 0; i < rows.length; i++) {
        loss -= ours[i].logits[tokens[at + i + 1]] - ours[i].shift;
        agreed += ours[i].top === theirs[i].top ? 1 : 0;
        divergence += divergenceOf(theirs[i], ours[i]);
      }
      onProgress?.(at + rows.length, total);
    }
  }
  return {
    perplexity: Math.exp(loss / total),
    predicted: total,
    agreement: agreed / total,
    divergence: divergence / total,
  };
}
