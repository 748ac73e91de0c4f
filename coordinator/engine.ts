/**
 * What the API sees of the fleet: prompts of token ids in, tokens out.
 *
 * @module
 */
import type { FleetSnapshot } from "./snapshot.ts";

/** One sequence to generate: one choice of one prompt. */
export interface GenerateRequest {
  promptTokens: Uint32Array;
  /** At least 1. The context bound applies beside it. */
  maxTokens: number;
  temperature: number;
  topP: number;
  /** 0 is off. */
  topK: number;
  seed: bigint;
  /** Index among the request's choices: part of the key of every draw. */
  choice: number;
  presencePenalty: number;
  frequencyPenalty: number;
  /** Token id to addition. */
  bias: ReadonlyMap<number, number>;
  /** Alternatives to report with each token, 0 to 20. */
  alternatives: number;
  /** Ends the sequence when drawn (the token itself is reported, then `stop`). */
  stopTokens: readonly number[];
}

/** All but the prompt of the plainest request: one token, greedy, with nothing added. */
export const PLAIN_REQUEST: Omit<GenerateRequest, "promptTokens"> = {
  maxTokens: 1,
  temperature: 0,
  topP: 1,
  topK: 0,
  seed: 0n,
  choice: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  bias: new Map(),
  alternatives: 0,
  stopTokens: [],
};

/** A token with its log-probability (after bias and penalties, at temperature 1). */
export interface TokenLogprob {
  token: number;
  logprob: number;
}

/** What generation yields. A failure is thrown as a FleetError instead. */
export type GenerateEvent =
  | ({ type: "token"; alternatives: TokenLogprob[] } & TokenLogprob)
  /** `stop`: a stop token was drawn. `length`: `maxTokens` or the context is used up. */
  | { type: "finish"; reason: "stop" | "length" };

/** Whether tokens come out. */
export interface Readiness {
  ready: boolean;
  /** Why not, or what showed that it is. */
  reason: string;
}

/** The fleet, as the API uses it. */
export interface Engine {
  /** What `GET /v1/models` and the request's `model` name. */
  readonly model: {
    id: string;
    createdUnix: number;
    contextTokens: number;
    vocabSize: number;
    /** Token ids that end a sequence. */
    eosTokens: readonly number[];
    bosToken: number | null;
  };
  /**
   * Admits a sequence at once or throws; then yields its tokens. Ends the sequence when `signal`
   * aborts (the iterator then ends without a `finish`).
   *
   * @throws FleetError `too-large` (can never fit), `overloaded` (queue full), `unavailable`
   */
  generate(request: GenerateRequest, signal: AbortSignal): AsyncIterable<GenerateEvent>;
  /** A picture of the fleet now. */
  snapshot(): FleetSnapshot;
  /** For `/readyz`. */
  readiness(): Promise<Readiness>;
  /** Calls `listener` whenever the picture changed (at most a few times a second); returns how to stop. */
  onChange(listener: () => void): () => void;
}
