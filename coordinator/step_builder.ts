/**
 * Puts one step together, rows of many sequences under the bounds of rows, sequences, outputs and
 * frame bytes, and takes its results apart again.
 *
 * @module
 */
import type { StepFrameShape } from "../shared/codec.ts";
import { FleetError, invariant } from "../shared/errors.ts";
import type { RowRequest, RowResult, StepBatch } from "../shared/frames.ts";
import { pagesFor } from "./kv_allocator.ts";
import { pendingRows, samplingParams, type Sequence } from "./sequence.ts";

/** What decides the size of a step's frame on a given pipeline, counted over the whole step. */
export type StepShape = Omit<StepFrameShape, "hiddenSize" | "stages">;

/** The bounds of one step. */
export interface StepBounds {
  maxRows: number;
  maxSequencesPerStep: number;
  maxOutputs: number;
  /** The largest frame of the step at any stage. */
  maxFrameBytes: number;
  /** Bytes of the largest frame (activations and all traces included) that a step of this shape takes. */
  frameBytes: (shape: StepShape) => number;
}

/** The rows that one sequence brings to a step. */
export interface StepEntry {
  sequence: Sequence;
  /** Positions `[from, to)`. */
  from: number;
  to: number;
  /** The last row is the newest token's, and draws the next one. */
  samples: boolean;
  /** Its page table up to `to`. */
  pages: Uint32Array;
}

/** The shape of an empty step. */
const EMPTY_SHAPE: StepShape = {
  rows: 0,
  sequences: 0,
  pageEntries: 0,
  requests: 0,
  biasEntries: 0,
  countEntries: 0,
};

/** One step in the making. */
export class StepBuilder {
  readonly #bounds: StepBounds;
  #shape = EMPTY_SHAPE;
  readonly entries: StepEntry[] = [];

  constructor(bounds: StepBounds) {
    this.#bounds = bounds;
  }

  /**
   * Adds the next rows of `sequence`, as many of `wanted` as fit.
   *
   * @param table its page table; covers the rows
   * @returns what was added, or null when not even one row fits
   */
  add(sequence: Sequence, wanted: number, table: readonly number[]): StepEntry | null {
    const { maxRows, maxSequencesPerStep } = this.#bounds;
    if (this.#shape.sequences >= maxSequencesPerStep) return null;
    let rows = Math.min(wanted, pendingRows(sequence), maxRows - this.#shape.rows);
    if (rows >= 1 && !this.#fits(sequence, rows)) rows = this.#most(sequence, rows);
    if (rows < 1) return null;
    this.#shape = this.#with(sequence, rows);
    const from = sequence.computed, to = from + rows;
    const entry: StepEntry = {
      sequence,
      from,
      to,
      samples: to === sequence.tokens.length,
      pages: Uint32Array.from(table.slice(0, pagesFor(to))),
    };
    this.entries.push(entry);
    return entry;
  }

  /** The batch: decode rows first, then prefill rows; each in the order the sequences were added. */
  build(): StepBatch {
    invariant(this.entries.length > 0, "a step has at least one row");
    const { rows } = this.#shape;
    const batch: StepBatch = {
      sequences: this.entries.map(({ pages }) => ({ pages })),
      rowSequence: new Uint16Array(rows),
      rowPosition: new Uint32Array(rows),
      rowToken: new Uint32Array(rows),
      decodeRows: 0,
      requests: [],
    };
    let row = 0;
    for (const kind of ["decode", "prefill"] as const) {
      for (const [index, entry] of this.entries.entries()) {
        const { sequence, samples } = entry;
        const promptLength = sequence.request.promptTokens.length;
        const from = kind === "decode" ? Math.max(entry.from, promptLength) : entry.from;
        const to = kind === "decode" ? entry.to : Math.min(entry.to, promptLength);
        for (let position = from; position < to; position++, row++) {
          batch.rowSequence[row] = index;
          batch.rowPosition[row] = position;
          batch.rowToken[row] = sequence.tokens[position];
          if (samples && position === entry.to - 1) {
            batch.requests.push({ type: "sample", row, sampling: samplingParams(sequence) });
          }
        }
      }
      if (kind === "decode") batch.decodeRows = row;
    }
    invariant(row === rows, `${row} rows were laid out, ${rows} counted`);
    return batch;
  }

  #with(sequence: Sequence, rows: number): StepShape {
    const to = sequence.computed + rows, samples = to === sequence.tokens.length;
    return {
      rows: this.#shape.rows + rows,
      sequences: this.#shape.sequences + 1,
      pageEntries: this.#shape.pageEntries + pagesFor(to),
      requests: this.#shape.requests + (samples ? 1 : 0),
      biasEntries: this.#shape.biasEntries + (samples ? sequence.request.bias.size : 0),
      countEntries: this.#shape.countEntries + (samples ? sequence.counts.size : 0),
    };
  }

  #fits(sequence: Sequence, rows: number): boolean {
    const shape = this.#with(sequence, rows);
    return shape.requests <= this.#bounds.maxOutputs &&
      this.#bounds.frameBytes(shape) <= this.#bounds.maxFrameBytes;
  }

  /** The largest number of rows below `rows` that fits; 0 when none does. Fitting is monotone. */
  #most(sequence: Sequence, rows: number): number {
    let fits = 0, tooMany = rows;
    while (tooMany - fits > 1) {
      const middle = (fits + tooMany) >> 1;
      if (this.#fits(sequence, middle)) fits = middle;
      else tooMany = middle;
    }
    return fits;
  }
}

/** The requests' sequences: `requests[i]` of the batch belongs to the `i`-th of these. */
export function requestEntries(entries: readonly StepEntry[], batch: StepBatch): StepEntry[] {
  return batch.requests.map((request: RowRequest) => entries[batch.rowSequence[request.row]]);
}

/**
 * The results as answers to the step's requests, checked one by one.
 *
 * @throws FleetError `bad-frame` when they answer anything else
 */
export function samplesOf(
  batch: StepBatch,
  results: readonly RowResult[],
): Extract<RowResult, { type: "sample" }>[] {
  const wrong = (why: string) => new FleetError("bad-frame", `The results of a step ${why}`);
  if (results.length !== batch.requests.length) {
    throw wrong(`are ${results.length}, its requests ${batch.requests.length}`);
  }
  return results.map((result, index) => {
    const request = batch.requests[index];
    if (result.row !== request.row || result.type !== "sample") {
      throw wrong(`answer row ${result.row} where row ${request.row} asked`);
    }
    return result;
  });
}
