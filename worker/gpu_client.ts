/**
 * The main thread's end of the GPU thread: the loader and runner that a worker uses, with the GPU on
 * another thread.
 *
 * @module
 */
import type { FleetError } from "../shared/errors.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import type { AssignStage } from "../shared/protocol.ts";
import type { GpuCalls, OpenedGpu, OpenGpu } from "./gpu_calls.ts";
import type { PartLocation } from "./part_location.ts";
import { frameRunner } from "./step_crossing.ts";
import { Thread } from "./thread.ts";
import type { LoadedStage, LoadNote, StageLoader } from "./worker.ts";

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
      runner: frameRunner((frame) =>
        this.#thread.call("run", { epoch, frame }, { transfer: [frame.buffer] })
      ),
      destroy: () => this.#thread.call("unload", { epoch }),
    };
  }
}
