/**
 * A stage's surroundings for tests: small steps, and a simulated runner that keeps pages as the real
 * one does, so that a frame applied twice, late or not at all shows in the numbers.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";
import { invariant } from "../shared/errors.ts";
import type { RowResult, StepBatch, StepFrame } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import type { AssignStage, StageLimits } from "../shared/protocol.ts";
import type { RunnerOutput, StageRunner } from "./stage.ts";

/** Width of the simulated model. */
export const HIDDEN = 4;

/** Bounds of the simulated stages. */
export const BOUNDS: StageLimits = {
  maxRows: 16,
  maxSequences: 4,
  maxOutputs: 4,
  pages: 8,
  contextTokens: 128,
};

/** What a worker would be asked to serve: stage `index` of a chain of `names`. */
export function chainStage(
  names: string[],
  index: number,
  epoch: number,
): Pick<AssignStage, "epoch" | "stage" | "previous" | "next" | "limits"> {
  const stages = names.length;
  return {
    epoch,
    stage: {
      index,
      stages,
      from: index,
      to: index + 1,
      first: index === 0,
      last: index === stages - 1,
    },
    previous: index === 0 ? "coordinator" : names[index - 1],
    next: index === stages - 1 ? "coordinator" : names[index + 1],
    limits: BOUNDS,
  };
}

/** One row of a step. */
export interface Row {
  sequence: number;
  position: number;
  token: number;
}

/** A batch of decode rows; sequence `s` owns pages `2 s` and `2 s + 1`. Each last row is scored. */
export function batchOf(rows: Row[]): StepBatch {
  const sequences = [...new Set(rows.map((row) => row.sequence))];
  const lastOf = (row: Row) => rows.findLast((other) => other.sequence === row.sequence);
  return {
    sequences: sequences.map((s) => ({ pages: Uint32Array.of(2 * s, 2 * s + 1) })),
    rowSequence: Uint16Array.from(rows, (row) => sequences.indexOf(row.sequence)),
    rowPosition: Uint32Array.from(rows, (row) => row.position),
    rowToken: Uint32Array.from(rows, (row) => row.token),
    decodeRows: rows.length,
    requests: rows.flatMap((row, index) =>
      row === lastOf(row) ? [{ type: "score" as const, row: index, token: 1 }] : []
    ),
  };
}

/** A step of attempt 1, as the coordinator would issue it. */
export function stepOf(step: number, batch: StepBatch, more: Partial<StepFrame> = {}): StepFrame {
  return {
    type: "step",
    epoch: 1,
    attempt: 1,
    attemptBase: 1,
    step,
    issuedAtMs: 1000,
    batch,
    hidden: null,
    traces: [],
    ...more,
  };
}

/**
 * A stage of integer arithmetic: each row writes its input to its slot and puts out a hash of all
 * that its sequence has in its slots so far.
 */
export class SimulatedRunner implements StageRunner {
  /** Steps run to their end. */
  steps = 0;
  /** The most steps that were at the runner at once. */
  most = 0;
  /** The next runs reject with this. */
  failure: Error | null = null;
  readonly slots = new Map<number, number>();
  readonly #clock: Clock;
  readonly #stepMs: number;
  readonly #last: boolean;
  #inFlight = 0;
  #tail: Promise<unknown> = Promise.resolve();

  constructor(clock: Clock, options: { stepMs: number; last: boolean }) {
    this.#clock = clock;
    this.#stepMs = options.stepMs;
    this.#last = options.last;
  }

  run(batch: StepBatch, hidden: Uint16Array | null): Promise<RunnerOutput> {
    this.#inFlight++;
    this.most = Math.max(this.most, this.#inFlight);
    const output = this.#tail.then(() => this.#step(batch, hidden));
    this.#tail = output.catch(() => {});
    return output;
  }

  async #step(batch: StepBatch, hidden: Uint16Array | null): Promise<RunnerOutput> {
    const startedAtMs = this.#clock.unixMs();
    await new Promise<void>((resolve) => this.#clock.after(this.#stepMs, resolve));
    this.#inFlight--;
    if (this.failure) throw this.failure;
    this.steps++;
    const sums = Array.from(batch.rowToken, (token, row) => this.#row(batch, row, token, hidden));
    return {
      startedAtMs,
      gpuMs: this.#stepMs,
      readbackMs: 0,
      hidden: this.#last ? null : Uint16Array.from(
        { length: sums.length * HIDDEN },
        (_, i) => sums[Math.floor(i / HIDDEN)] + i % HIDDEN,
      ),
      results: this.#last
        ? batch.requests.map(({ row }): RowResult => ({ type: "score", row, logprob: -sums[row] }))
        : [],
    };
  }

  #row(batch: StepBatch, row: number, token: number, hidden: Uint16Array | null): number {
    const { pages } = batch.sequences[batch.rowSequence[row]];
    const slot = (position: number) =>
      pages[Math.floor(position / LIMITS.pageTokens)] * LIMITS.pageTokens +
      position % LIMITS.pageTokens;
    const input = hidden ? hidden[row * HIDDEN] : token;
    this.slots.set(slot(batch.rowPosition[row]), input);
    let sum = 0;
    for (let position = 0; position <= batch.rowPosition[row]; position++) {
      const value = this.slots.get(slot(position));
      invariant(value !== undefined, `position ${position} was never written`);
      sum = (sum * 31 + value + 1) % 60_000;
    }
    return sum;
  }
}

/** Lets every promise that can settle do so. */
export async function settle(): Promise<void> {
  for (let i = 0; i < 30; i++) await Promise.resolve();
}
