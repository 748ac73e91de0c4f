/**
 * A sequence as the scheduler keeps it: its tokens, how many of them are in the KV cache, and what
 * its next row asks for.
 *
 * @module
 */
import type { SamplingParams } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import type { GenerateRequest } from "./engine.ts";

/** What the scheduler is asked to generate. */
export interface SubmittedSequence extends GenerateRequest {
  id: string;
}

/** A sequence between its submission and its end. */
export interface Sequence {
  readonly id: string;
  /** Order of submission: the smaller, the older. */
  readonly age: number;
  readonly request: GenerateRequest;
  /** Prompt, then generated tokens: `tokens[p]` stands at position `p`. */
  readonly tokens: number[];
  /** Generated tokens and how often, kept when a penalty wants them. */
  readonly counts: Map<number, number>;
  /** Positions `[0, computed)` are in the KV cache, once the step in flight has been applied. */
  computed: number;
  /** Number of the step in flight it is in. */
  step: number | null;
  /** Number of the last step it was in, for taking turns. */
  lastStep: number;
  /** Its pages were taken while in flight: it starts over when the step returns. */
  evicted: boolean;
  /** Its client went away while in flight: it ends when the step returns. */
  cancelled: boolean;
}

/** A new sequence. */
export function createSequence(submitted: SubmittedSequence, age: number): Sequence {
  return {
    id: submitted.id,
    age,
    request: submitted,
    tokens: Array.from(submitted.promptTokens),
    counts: new Map(),
    computed: 0,
    step: null,
    lastStep: 0,
    evicted: false,
    cancelled: false,
  };
}

/** Tokens known but not in the KV cache: at least 1 until the sequence ends. */
export function pendingRows(sequence: Sequence): number {
  return sequence.tokens.length - sequence.computed;
}

/** Tokens generated so far. */
export function generatedTokens(sequence: Sequence): number {
  return sequence.tokens.length - sequence.request.promptTokens.length;
}

/** One row with a generated token: the ordinary way forward, as opposed to catching up. */
export function isDecoding(sequence: Sequence): boolean {
  return pendingRows(sequence) === 1 && generatedTokens(sequence) > 0;
}

/** Whether `presence_penalty` or `frequency_penalty` is in use. */
export function hasPenalties(request: GenerateRequest): boolean {
  return request.presencePenalty !== 0 || request.frequencyPenalty !== 0;
}

/**
 * How the sequence's next token is drawn.
 *
 * Penalties count *generated* tokens only, not the prompt's, as OpenAI and vLLM do for presence and
 * frequency. Tokens are listed in rising order, so that equal requests make equal frames.
 */
export function samplingParams(sequence: Sequence): SamplingParams {
  const { request } = sequence;
  const bias = [...request.bias].sort(([a], [b]) => a - b);
  const counts = [...sequence.counts].sort(([a], [b]) => a - b);
  return {
    temperature: request.temperature,
    topP: request.topP,
    topK: request.topK,
    seedLow: Number(BigInt.asUintN(32, request.seed)),
    seedHigh: Number(BigInt.asUintN(32, request.seed >> 32n)),
    choice: request.choice,
    presencePenalty: request.presencePenalty,
    frequencyPenalty: request.frequencyPenalty,
    biasTokens: Uint32Array.from(bias, ([token]) => token),
    biasValues: Float32Array.from(bias, ([, value]) => value),
    countTokens: Uint32Array.from(counts, ([token]) => token),
    counts: Uint32Array.from(counts, ([, count]) => count),
    alternatives: request.alternatives,
  };
}

/** Appends a drawn token. */
export function appendToken(sequence: Sequence, token: number): void {
  sequence.tokens.push(token);
  if (hasPenalties(sequence.request)) {
    sequence.counts.set(token, (sequence.counts.get(token) ?? 0) + 1);
  }
}

/**
 * Why the sequence ends after the token appended last, or null.
 *
 * Beside `maxTokens` and the context, the number of distinct tokens that a row can carry for
 * penalties is a bound too (`LIMITS.maxCountEntries`).
 */
export function finishReason(sequence: Sequence, contextTokens: number): "stop" | "length" | null {
  const { request, tokens } = sequence;
  if (request.stopTokens.includes(tokens[tokens.length - 1])) return "stop";
  if (generatedTokens(sequence) >= request.maxTokens) return "length";
  if (tokens.length >= contextTokens) return "length";
  if (sequence.counts.size >= LIMITS.maxCountEntries) return "length";
  return null;
}
