/**
 * Steps as a fleet would bring them to a stage, with tokens of no meaning.
 *
 * @module
 */
import type { StageSpec } from "../model/mod.ts";
import { GREEDY, type RowRequest, type StepBatch } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";

/** A stage's limits for so many sequences at once, and prompts of so many rows. */
export function stageLimits(sequences: number, contextTokens: number, prompt: number) {
  return {
    maxRows: Math.max(sequences, prompt),
    maxSequences: sequences,
    maxOutputs: sequences,
    pages: sequences * Math.ceil(contextTokens / LIMITS.pageTokens),
    contextTokens,
  };
}

/** Steps for a stage. */
export class StageBatches {
  readonly #spec: StageSpec;

  constructor(spec: StageSpec) {
    this.#spec = spec;
  }

  /** One row of each of `rows` sequences at `position`, as decoding brings them. */
  decode(rows: number, position: number): StepBatch {
    return {
      sequences: Array.from({ length: rows }, (_, s) => ({ pages: this.#pagesOf(s) })),
      rowSequence: Uint16Array.from({ length: rows }, (_, row) => row),
      rowPosition: new Uint32Array(rows).fill(position),
      rowToken: Uint32Array.from({ length: rows }, (_, row) => row),
      decodeRows: rows,
      requests: this.#spec.last ? Array.from({ length: rows }, (_, row) => greedy(row)) : [],
    };
  }

  /** The first `rows` rows of a prompt. */
  prefill(rows: number): StepBatch {
    return {
      sequences: [{ pages: this.#pagesOf(0) }],
      rowSequence: new Uint16Array(rows),
      rowPosition: Uint32Array.from({ length: rows }, (_, i) => i),
      rowToken: Uint32Array.from({ length: rows }, (_, i) => i),
      decodeRows: 0,
      requests: this.#spec.last ? [greedy(rows - 1)] : [],
    };
  }

  /** What the stage before would have sent with `rows` rows; null on the first stage. */
  hidden(rows: number): Uint16Array | null {
    const { first, config } = this.#spec;
    return first ? null : new Uint16Array(rows * config.hiddenSize).fill(0x3400);
  }

  #pagesOf(sequence: number): Uint32Array {
    const each = Math.ceil(this.#spec.limits.contextTokens / LIMITS.pageTokens);
    return Uint32Array.from({ length: each }, (_, i) => sequence * each + i);
  }
}

function greedy(row: number): RowRequest {
  return { type: "sample", row, sampling: GREEDY };
}
