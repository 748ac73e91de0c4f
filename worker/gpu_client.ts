/**
 * The main thread's end of the GPU thread: the loader and runner that a worker uses, with the GPU on
 * another thread.
 *
 * @module
 */
import { encodeFrame } from "../shared/codec.ts";
import type { FleetError } from "../shared/errors.ts";
import type { StepBatch, StepFrame } from "../shared/frames.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import type { AssignStage } from "../shared/protocol.ts";
import type { GpuCalls, OpenedGpu, OpenGpu } from "./gpu_calls.ts";
import type { PartLocation } from "./part_location.ts";
import type { RunnerOutput } from "./stage.ts";
import { Thread } from "./thread.ts";
import type { LoadedStage, LoadNote, StageLoader } from "./worker.ts";

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

/** The GPU, on its own thread. */
export class GpuClient implements StageLoader<PartLocation> {
  /** Resolves when the GPU cannot be used any more. */
  readonly failure: Promise<FleetError>;
  readonly #thread = new Thread<GpuCalls>(new URL("./gpu_thread.ts", import.meta.url), "GPU");

  constructor() {
    const watched = this.#thread.call("watch", null);
    this.failure = watched.catch((error: FleetError) => error);
  }

  /**
   * Opens, tests and calibrates the adapter.
   *
   * @throws FleetError `gpu` when there is none that will do
   */
  open(options: OpenGpu, onProgress: (line: string) => void): Promise<OpenedGpu> {
    return this.#thread.call("open", options, { onNote: onProgress });
  }

  async load(
    assignment: AssignStage,
    config: ModelConfig,
    parts: PartLocation[],
    tell: (note: LoadNote) => void,
  ): Promise<LoadedStage> {
    const { epoch } = assignment;
    const args = { assignment, config, parts };
    const { memoryBytes } = await this.#thread.call("load", args, { onNote: tell });
    return {
      memoryBytes,
      runner: { run: (batch, hidden) => this.#run(epoch, batch, hidden) },
      destroy: () => this.#thread.call("unload", { epoch }),
    };
  }

  /** As a frame the whole step is one buffer, and moves. */
  #run(epoch: number, batch: StepBatch, hidden: Uint16Array | null): Promise<RunnerOutput> {
    const frame = encodeFrame({ ...UNORDERED, batch, hidden });
    return this.#thread.call("run", { epoch, frame }, { transfer: [frame.buffer] });
  }
}
