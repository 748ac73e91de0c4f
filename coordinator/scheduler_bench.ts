/**
 * What a token costs the coordinator beside its API: scheduling, the ledger, the frame out and the
 * result in, at 8 sequences on 4 stages.
 *
 * @module
 */
import { decodeFrame, encodeFrame, stepFrameBytes } from "../shared/codec.ts";
import { PLAIN_REQUEST } from "./engine.ts";
import { Ledger } from "./ledger.ts";
import { type ScheduledStep, Scheduler } from "./scheduler.ts";

const SEQUENCES = 8, STAGES = 4, TOKENS = 2000;

function fullScheduler(): Scheduler {
  const scheduler = new Scheduler({
    stages: STAGES,
    maxStepsInFlight: 2 * STAGES,
    maxRows: 64,
    maxSequencesPerStep: 16,
    maxOutputs: 16,
    prefillRowsPerStep: 64,
    pages: 1000,
    contextTokens: 4096,
    maxQueuedSequences: 64,
    maxFrameBytes: 1 << 20,
    frameBytes: (shape) => stepFrameBytes({ ...shape, hiddenSize: 8192, stages: STAGES }),
  });
  for (let i = 0; i < SEQUENCES; i++) {
    scheduler.submit({
      ...PLAIN_REQUEST,
      id: `s${i}`,
      promptTokens: new Uint32Array(1000),
      maxTokens: 3000,
      temperature: 1,
      seed: BigInt(i),
    });
  }
  return scheduler;
}

Deno.bench(`${TOKENS} tokens of ${SEQUENCES} sequences on ${STAGES} stages`, () => {
  const scheduler = fullScheduler(), ledger = new Ledger<ScheduledStep>(1);
  let tokens = 0;
  while (tokens < TOKENS) {
    const step = scheduler.nextStep()!;
    const order = ledger.issue(step.step, step, 0);
    const common = { ...order, issuedAtMs: 0, traces: [] };
    encodeFrame({ type: "step", ...common, batch: step.batch, hidden: null });
    const results = step.batch.requests.map(({ row }) => ({
      type: "sample" as const,
      row,
      token: 5,
      logprob: -1,
      alternativeTokens: new Uint32Array(0),
      alternativeLogprobs: new Float32Array(0),
    }));
    const frame = decodeFrame(encodeFrame({ type: "result", ...common, results }));
    if (frame.type !== "result" || ledger.accept(frame, 1).type !== "accepted") throw new Error();
    tokens += scheduler.complete(step.step, frame.results).length;
  }
});
