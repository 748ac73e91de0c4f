/**
 * What the main thread asks of the GPU thread.
 *
 * @module
 */
import type { GpuInfo } from "../kernels/gpu.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import type { AssignStage, WorkerCard } from "../shared/protocol.ts";
import type { PartLocation } from "./part_location.ts";
import type { RunnerOutput } from "./stage.ts";
import type { LoadNote } from "./worker.ts";

/** What was learned of the GPU when it was opened. */
export interface OpenedGpu {
  info: GpuInfo;
  maxBindingBytes: number;
  selfTestDigest: string;
  selfTestMs: number;
  calibration: WorkerCard["calibration"];
}

/** How to open the GPU. */
export interface OpenGpu {
  software: boolean;
  /** Where the kernel variants that were chosen on this machine are kept. */
  tuningFile: string;
}

/** The calls. A stage is named by its epoch. */
export type GpuCalls = {
  /** Opens the adapter, tests and calibrates it. Notes are lines for the log. */
  open: { args: OpenGpu; result: OpenedGpu; note: string };
  /** Puts a stage onto the GPU, where no other may be. */
  load: {
    args: { assignment: AssignStage; config: ModelConfig; parts: PartLocation[] };
    result: { memoryBytes: number };
    note: LoadNote;
  };
  /** Runs a step: `frame` holds its batch and activations, as the codec writes them. */
  run: { args: { epoch: number; frame: Uint8Array<ArrayBuffer> }; result: RunnerOutput };
  /** Frees a stage's pages and scratch. */
  unload: { args: { epoch: number }; result: void };
  /** Never returns; fails when the device is lost or reports an error that nobody asked for. */
  watch: { args: null; result: never };
};
