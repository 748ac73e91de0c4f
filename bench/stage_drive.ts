/**
 * A worker's stage driven as a fleet drives it: frames in, frames out, with one or two steps in
 * flight, the GPU on its own thread. Only the bus is missing; its time is an argument.
 *
 * @module
 */
import { setImmediate } from "node:timers";
import type { StageSpec } from "../model/mod.ts";
import type { Bus, BusMessage } from "../shared/bus.ts";
import { systemClock } from "../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import type { StepBatch } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import { subjects } from "../shared/protocol.ts";
import { createStage, type RunnerOutput, type StageRunner } from "../worker/mod.ts";
import { type StepSample, WARM_UP_STEPS } from "./model_calls.ts";
import { StageBatches } from "./stage_batches.ts";

const SUBJECTS = subjects("bench");
const [WORKER, BEFORE, BEHIND] = ["worker", "before", "behind"];
const EPOCH = 1;

/** What a measurement is to be like. */
export interface Drive {
  /** Sequences of a microbatch. */
  rows: number;
  context: number;
  steps: number;
  /**
   * Microbatches: 1 is a stage that has nothing to do between its steps, 2 a busy one. All use the same
   * pages, which are long out of the GPU's caches when the next one comes.
   */
  inFlight: number;
  /** From a step's output to the next step of the same sequences, ms. */
  wireMs: number;
}

/** Drives one stage through any number of measurements. */
export class StageDrive {
  readonly #batches: StageBatches;
  readonly #outputs: RunnerOutput[] = [];
  readonly #toStage: (frame: Uint8Array<ArrayBuffer>) => void;
  #onOutput: () => void = () => {};
  #fail: (error: unknown) => void = () => {};
  #step = 0;

  /** @param runner the stage's, on the GPU thread */
  constructor(spec: StageSpec, runner: StageRunner) {
    this.#batches = new StageBatches(spec);
    let listener: (message: BusMessage) => void = () => {};
    const bus: Bus = {
      maxPayloadBytes: LIMITS.maxFrameBytes,
      status: "connected",
      publish: (_, data) => {
        decodeFrame(data as Uint8Array<ArrayBuffer>); // as its receiver would
        this.#onOutput();
      },
      subscribe: (_, handler) => (listener = handler, { unsubscribe() {} }),
      request: () => Promise.reject(new Error("nobody answers here")),
      onStatus: () => ({ unsubscribe() {} }),
      flush: () => Promise.resolve(),
      close: () => Promise.resolve(),
    };
    createStage({
      bus,
      clock: systemClock,
      subjects: SUBJECTS,
      worker: WORKER,
      instance: "bench",
      assignment: {
        epoch: EPOCH,
        stage: { ...spec, index: 0, stages: 1 },
        previous: BEFORE,
        next: BEHIND,
        limits: spec.limits,
      },
      config: spec.config,
      runner: { run: (batch, hidden) => this.#counted(runner.run(batch, hidden)) },
      onFailure: (error) => this.#fail(error),
    });
    const subject = SUBJECTS.step(WORKER, BEFORE, EPOCH);
    this.#toStage = (data) => listener({ subject, data });
  }

  /** Times of steps behind the first ones; `encodeMs` is the GPU thread's own affair. */
  async measure({ rows, context, steps, inFlight, wireMs }: Drive): Promise<StepSample[]> {
    const samples: StepSample[] = [];
    const all = WARM_UP_STEPS + steps;
    let sent = 0, endedMs = performance.now();
    const send = () => {
      if (sent === all) return;
      const position = context + Math.floor(sent++ / inFlight);
      this.#send(this.#batches.decode(rows, position));
    };
    await new Promise<void>((resolve, reject) => {
      this.#fail = reject;
      this.#onOutput = () => {
        const nowMs = performance.now();
        const { gpuMs, readbackMs, gpuIdleMs = null } = this.#outputs.shift()!;
        samples.push({
          stepMs: nowMs - endedMs,
          gpuMs,
          encodeMs: null,
          readbackMs,
          idleMs: gpuIdleMs,
        });
        endedMs = nowMs;
        if (samples.length === all) resolve();
        else whenDue(nowMs + wireMs).then(send, reject);
      };
      for (let i = 0; i < inFlight; i++) send();
    });
    return samples.slice(WARM_UP_STEPS);
  }

  #send(batch: StepBatch): void {
    this.#toStage(encodeFrame({
      type: "step",
      epoch: EPOCH,
      attempt: 1,
      attemptBase: 1,
      step: ++this.#step,
      issuedAtMs: systemClock.unixMs(),
      batch,
      hidden: this.#batches.hidden(batch.rowToken.length),
      traces: [],
    }));
  }

  async #counted(running: Promise<RunnerOutput>): Promise<RunnerOutput> {
    const output = await running;
    this.#outputs.push(output);
    return output;
  }
}

/** Resolves at `dueMs`, to the tenth of a millisecond: timers would be a millisecond late. */
async function whenDue(dueMs: number): Promise<void> {
  while (performance.now() < dueMs) await new Promise((resolve) => void setImmediate(resolve));
}
