/**
 * A stage's first steps, before anybody waits for them.
 *
 * Many drivers compile a kernel when it is first dispatched, not when its pipeline is made: on a
 * software adapter the first prefill step takes seconds, and a coordinator would take it for lost.
 *
 * @module
 */
import { BATCHES } from "../kernels/mod.ts";
import { GREEDY, type RowRequest, type SamplingParams, type StepBatch } from "../shared/frames.ts";
import type { StageSpec, StageSteps } from "./stage_spec.ts";

/** Decode rows of the warm-up steps: each makes another batch size of the decode kernels run. */
const DECODE_ROWS: readonly number[] = BATCHES;

/**
 * Runs every kernel of a stage once. Pages hold nothing of worth yet: what is written to them is
 * overwritten before it is read.
 *
 * @throws FleetError `gpu`
 */
export async function warmUp(model: StageSteps, spec: StageSpec): Promise<void> {
  const { maxRows, maxSequences, pages } = spec.limits;
  const most = Math.min(maxRows - 1, maxSequences - 1, pages - 1);
  const steps = DECODE_ROWS.filter((rows) => rows <= most);
  for (const rows of steps.length > 0 ? steps : [0]) {
    const batch = mixedBatch(rows, spec);
    const hidden = spec.first
      ? null
      : new Uint16Array(batch.rowToken.length * spec.config.hiddenSize);
    await model.finish(model.submit(batch, hidden));
  }
}

/** `decodeRows` decode rows and a prefill row, each the first row of a sequence of its own. */
function mixedBatch(decodeRows: number, { limits, last }: StageSpec): StepBatch {
  const rows = decodeRows + 1;
  const outputs = last ? Math.min(rows, limits.maxOutputs) : 0;
  return {
    sequences: Array.from({ length: rows }, (_, i) => ({ pages: Uint32Array.of(i) })),
    rowSequence: Uint16Array.from({ length: rows }, (_, i) => i),
    rowPosition: new Uint32Array(rows),
    rowToken: new Uint32Array(rows),
    decodeRows,
    requests: Array.from({ length: outputs }, (_, row): RowRequest => ({
      type: "sample",
      row,
      sampling: { ...EVERYTHING, temperature: row % 2 },
    })),
  };
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
