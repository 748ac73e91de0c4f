/**
 * What travels between coordinator and stages at every step, as typed values. `codec.ts` turns them
 * into bytes and back.
 *
 * A step's rows are ordered: all decode rows first, then all prefill rows. Rows of one sequence stand
 * together within their kind, by rising position. A sequence may bring rows of both kinds (a replay
 * that crosses from prompt to generated tokens).
 *
 * @module
 */

/** Where in the order of things a frame stands. All are u32. */
export interface FrameOrder {
  /** Grows with every plan of the whole fleet: it names one plan of one pipeline. */
  epoch: number;
  /** Grows when unfinished steps are reissued; starts at 1 in every epoch. */
  attempt: number;
  /** The first step of this attempt: a stage that sees a new attempt expects this step next. */
  attemptBase: number;
  /** Grows by one with every step of an epoch; starts at 1. */
  step: number;
}

/** One sequence of a step. */
export interface StepSequence {
  /** Page table: `pages[i]` holds positions `[32 i, 32 i + 32)`. Covers every position it brings. */
  pages: Uint32Array;
}

/** How a row samples its next token. */
export interface SamplingParams {
  /** 0 is greedy: the largest logit after bias and penalties, the lowest token id of equals. */
  temperature: number;
  /** Nucleus mass in `(0, 1]`; 1 is off. */
  topP: number;
  /** The number of largest logits that may be drawn; 0 is off. */
  topK: number;
  /** The key of the random draw: 64 bits of seed as two u32, and the choice index of the request. */
  seedLow: number;
  seedHigh: number;
  choice: number;
  presencePenalty: number;
  frequencyPenalty: number;
  /** Sparse additions to the logits. */
  biasTokens: Uint32Array;
  biasValues: Float32Array;
  /** Tokens generated so far and how often, for the penalties; empty when both are 0. */
  countTokens: Uint32Array;
  counts: Uint32Array;
  /** Alternatives to return beside the token, 0 to 20, by falling log-probability. */
  alternatives: number;
}

/** The plainest sampling: greedy, with nothing added. */
export const GREEDY: SamplingParams = {
  temperature: 0,
  topP: 1,
  topK: 0,
  seedLow: 0,
  seedHigh: 0,
  choice: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  biasTokens: new Uint32Array(0),
  biasValues: new Float32Array(0),
  countTokens: new Uint32Array(0),
  counts: new Uint32Array(0),
  alternatives: 0,
};

/** What one row is asked for. Rows without a request only write the KV cache. */
export type RowRequest =
  /** Draw the token that follows the row; keyed also by the row's position + 1. */
  | { type: "sample"; row: number; sampling: SamplingParams }
  /** The log-probability of `token` following the row (temperature 1, nothing added). */
  | { type: "score"; row: number; token: number }
  /** The whole row of logits (for evaluation; it must fit a frame). */
  | { type: "logits"; row: number };

/** The rows of a step. Struct of arrays, one entry per row. */
export interface StepBatch {
  sequences: StepSequence[];
  /** Index into `sequences`. */
  rowSequence: Uint16Array;
  rowPosition: Uint32Array;
  rowToken: Uint32Array;
  /** Rows `[0, decodeRows)` are decode rows, the rest prefill rows. */
  decodeRows: number;
  /** In rising order of `row`; at most one per row. */
  requests: RowRequest[];
}

/** A stage's account of one step. Times of day are the worker's own clock (ms since the epoch). */
export interface StageTrace {
  receivedAtMs: number;
  /** When the GPU thread took it up: `startedAtMs - receivedAtMs` is queueing. */
  startedAtMs: number;
  gpuMs: number;
  readbackMs: number;
  sentAtMs: number;
}

/** A step on its way from stage to stage. */
export interface StepFrame extends FrameOrder {
  type: "step";
  /** When the coordinator sent the step to stage 0, by its own clock. */
  issuedAtMs: number;
  batch: StepBatch;
  /** float16 bits, `(rows, hiddenSize)`; null on the way to stage 0. */
  hidden: Uint16Array | null;
  /** One per stage passed so far. */
  traces: StageTrace[];
}

/** What a row's request was answered with. */
export type RowResult =
  | {
    type: "sample";
    row: number;
    token: number;
    /** After bias and penalties, at temperature 1. */
    logprob: number;
    alternativeTokens: Uint32Array;
    alternativeLogprobs: Float32Array;
  }
  | { type: "score"; row: number; logprob: number }
  | { type: "logits"; row: number; logits: Float32Array };

/** What the last stage sends back to the coordinator. */
export interface ResultFrame extends FrameOrder {
  type: "result";
  issuedAtMs: number;
  /** In the order of the batch's requests. */
  results: RowResult[];
  traces: StageTrace[];
}

/** A frame. */
export type Frame = StepFrame | ResultFrame;
