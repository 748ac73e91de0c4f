/**
 * A step on its way to the GPU thread and its outputs back: as a frame the whole step is one buffer,
 * and moves.
 *
 * @module
 */
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import { invariant } from "../shared/errors.ts";
import type { StepBatch, StepFrame } from "../shared/frames.ts";
import type { RunnerOutput, StageRunner } from "./stage.ts";

/** Only the rows of a step cross to the GPU thread: where it stands in the order of things is ours. */
const UNORDERED: Omit<StepFrame, "batch" | "hidden"> = {
  type: "step",
  epoch: 1,
  attempt: 1,
  attemptBase: 1,
  step: 1,
  issuedAtMs: 0,
  traces: [],
};

/** A runner on the other side of `send`, which takes a frame and may take its buffer. */
export function frameRunner(
  send: (frame: Uint8Array<ArrayBuffer>) => Promise<RunnerOutput>,
): StageRunner {
  return { run: (batch, hidden) => send(stepAsFrame(batch, hidden)) };
}

function stepAsFrame(batch: StepBatch, hidden: Uint16Array | null): Uint8Array<ArrayBuffer> {
  return encodeFrame({ ...UNORDERED, batch, hidden });
}

/** Runs what {@linkcode frameRunner} sent; the buffers of the outputs are put on `transfer`. */
export async function runFrame(
  runner: StageRunner,
  frame: Uint8Array<ArrayBuffer>,
  transfer: Transferable[],
): Promise<RunnerOutput> {
  const step = decodeFrame(frame);
  invariant(step.type === "step", "a step is run");
  const output = await runner.run(step.batch, step.hidden);
  if (output.hidden) transfer.push(output.hidden.buffer);
  return output;
}
