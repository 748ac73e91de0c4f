/**
 * What `bench model` asks of its GPU thread, and the figures it gets.
 *
 * @module
 */
import type { StageSpec } from "../model/mod.ts";
import type { RunnerOutput } from "../worker/mod.ts";
import type { KernelTime } from "./kernel_times.ts";

/** Steps before the measured ones: drivers compile at first use, clocks rise under load. */
export const WARM_UP_STEPS = 12;
/**
 * So long they take at least, ms: a GPU comes to its clocks after loading, and a worker that has run for
 * a while has compiled its own code too.
 */
export const WARM_UP_MS = 1000;

/** Times of one step, ms. */
export interface StepSample {
  /** Wall time from one step's end to the next one's. */
  stepMs: number;
  gpuMs: number;
  /** CPU time of checking, writing and encoding a step, up to its submit. */
  encodeMs: number | null;
  /** Wall time of fetching the outputs once the GPU was done. */
  readbackMs: number;
  /** Between the step before and this one, by the GPU's own clock. */
  idleMs: number | null;
}

/** The calls. */
export type ModelCalls = {
  /** Makes a model of random weights and a stage of it. Notes are lines for people. */
  load: {
    args: { spec: StageSpec; software: boolean; tune: boolean };
    result: { adapter: string; memoryBytes: number; loadSeconds: number };
    note: string;
  };
  /** One step after another, on the GPU's thread, without frames. */
  direct: {
    args: { kind: "decode" | "prefill"; rows: number; context: number; steps: number };
    result: StepSample[];
  };
  /** What each kernel of a decode step takes. */
  profile: { args: { rows: number; context: number }; result: KernelTime[] };
  /** Runs a step, as a worker's GPU thread does. */
  run: { args: { frame: Uint8Array<ArrayBuffer> }; result: RunnerOutput };
};
