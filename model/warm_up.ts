/**
 * A stage's first steps, before anybody waits for them.
 *
 * Many drivers compile a kernel when it is first dispatched, not when its pipeline is made: on a
 * software adapter the first prefill step takes seconds, and a coordinator would take it for lost.
 *
 * @module
 */
import { defaultVariant, mostRows } from "../kernels/mod.ts";
import { GREEDY, type RowRequest, type SamplingParams, type StepBatch } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import type { StageLimits } from "../shared/protocol.ts";
import type { StageSpec, StageSteps } from "./stage_spec.ts";

/**
 * Runs every linear kernel that some number of rows takes, and all others, once. Pages hold nothing of
 * worth yet: what is written to them is overwritten before it is read.
 *
 * @param software the adapter is a software one, which has kernels of its own
 * @throws FleetError `gpu`
 */
export async function warmUp(model: StageSteps, spec: StageSpec, software: boolean): Promise<void> {
  for (const { decode, prefill } of warmUpRows(spec.limits, software)) {
    const batch = decode > 0 ? decodeBatch(decode, spec) : prefillBatch(prefill, spec);
    const hidden = spec.first
      ? null
      : new Uint16Array(batch.rowToken.length * spec.config.hiddenSize);
    await model.finish(model.submit(batch, hidden));
  }
}

/** Decode rows that fill each batch as far as there are so many; the fewest prefill rows of each tile. */
function warmUpRows(limits: StageLimits, software: boolean) {
  const { maxRows, maxSequences, pages, contextTokens } = limits;
  const { batches, prefillTiles } = defaultVariant(software);
  const sequences = Math.min(maxRows, maxSequences, pages);
  const positions = Math.min(maxRows, contextTokens, pages * LIMITS.pageTokens);
  const decode = new Set(batches.map((rows) => Math.min(rows, sequences)));
  const prefill = [1, ...prefillTiles.slice(0, -1).map((tile) => mostRows(tile) + 1)]
    .filter((rows) => rows <= positions);
  return [
    ...[...decode].map((rows) => ({ decode: rows, prefill: 0 })),
    ...prefill.map((rows) => ({ decode: 0, prefill: rows })),
  ];
}

/** Each row the first one of a sequence of its own. */
function decodeBatch(rows: number, spec: StageSpec): StepBatch {
  return {
    sequences: Array.from({ length: rows }, (_, i) => ({ pages: Uint32Array.of(i) })),
    rowSequence: Uint16Array.from({ length: rows }, (_, i) => i),
    rowPosition: new Uint32Array(rows),
    rowToken: new Uint32Array(rows),
    decodeRows: rows,
    requests: requestsOf(rows, spec),
  };
}

/** The first rows of one sequence. */
function prefillBatch(rows: number, spec: StageSpec): StepBatch {
  const pages = Math.ceil(rows / LIMITS.pageTokens);
  return {
    sequences: [{ pages: Uint32Array.from({ length: pages }, (_, i) => i) }],
    rowSequence: new Uint16Array(rows),
    rowPosition: Uint32Array.from({ length: rows }, (_, i) => i),
    rowToken: new Uint32Array(rows),
    decodeRows: 0,
    requests: requestsOf(rows, spec),
  };
}

/** Where there is a head, every row is sampled, as far as there is room for outputs. */
function requestsOf(rows: number, { last, limits }: StageSpec): RowRequest[] {
  return Array.from({ length: last ? Math.min(rows, limits.maxOutputs) : 0 }, (_, row) => ({
    type: "sample",
    row,
    sampling: { ...EVERYTHING, temperature: row % 2 },
  }));
}

/** Asks for all that sampling can do. */
const EVERYTHING: SamplingParams = {
  ...GREEDY,
  temperature: 1,
  topP: 0.5,
  biasTokens: Uint32Array.of(0),
  biasValues: Float32Array.of(1),
  alternatives: 1,
};
