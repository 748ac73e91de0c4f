/**
 * A stage on the GPU: steps in, activations or results out.
 *
 * @module
 */
import { invariant } from "../shared/errors.ts";
import type { RowRequest, StepBatch } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import type { Gpu } from "../kernels/gpu.ts";
import { Readback, type ReadRange, type ReadSlot } from "../kernels/readback.ts";
import { headShape, StepBuffers, tileRows } from "../kernels/transformer/mod.ts";
import { checkBatch } from "./check_batch.ts";
import { forward, type HeadKernels } from "./forward.ts";
import { GpuTimer } from "./gpu_timer.ts";
import { KvCache } from "./kv_cache.ts";
import { createStageMemory, type StageMemory } from "./stage_buffers.ts";
import { bindStage, type BoundStage } from "./stage_kernels.ts";
import type { StageOutput, StageProgress, StageSpec, StageSteps, Ticket } from "./stage_spec.ts";
import type { WeightStore } from "./weights.ts";

const IN_FLIGHT = LIMITS.maxStepsInFlightPerStage;

/** Everything a stage holds on the GPU beside its weights. */
interface StageResources {
  inputs: StepBuffers;
  memory: StageMemory;
  cache: KvCache;
  bound: BoundStage;
  readback: Readback;
  timer: GpuTimer | null;
}

/** A submitted step. */
class PendingStep implements Ticket {
  constructor(
    readonly id: number,
    readonly slot: ReadSlot,
    readonly rows: number,
    readonly requests: RowRequest[],
    readonly submittedMs: number,
  ) {}
}

/** A stage on the GPU. */
export class StageModel implements StageSteps {
  /** Weights, pages, scratch and staging. */
  readonly memoryBytes: number;
  readonly spec: StageSpec;
  readonly #gpu: Gpu;
  readonly #resources: StageResources;
  readonly #head: HeadKernels | null;
  /** Oldest first. */
  readonly #pending: PendingStep[] = [];
  #submitted = 0;
  /** When the GPU was last seen to have finished a step. */
  #idleSinceMs = 0;

  private constructor(gpu: Gpu, spec: StageSpec, resources: StageResources, memoryBytes: number) {
    this.#gpu = gpu;
    this.spec = spec;
    this.#resources = resources;
    this.memoryBytes = memoryBytes;
    const { leave } = resources.bound.kernels;
    this.#head = "sampler" in leave ? leave : null;
  }

  /**
   * Makes a stage's pages, activations and kernels. Its parts must be in the store, and stay there
   * until the stage is destroyed.
   *
   * @throws FleetError `out-of-memory`, `bad-checkpoint` (heads that cannot be run), `gpu`
   */
  static async load(
    gpu: Gpu,
    spec: StageSpec,
    weights: WeightStore,
    onProgress?: (progress: StageProgress) => void,
  ): Promise<StageModel> {
    const { config, limits } = spec;
    const shape = headShape(config);
    const undo: (() => void)[] = [];
    const made = <T>(thing: T, destroy: () => void): T => (undo.push(destroy), thing);
    try {
      const cache = await KvCache.create(gpu, shape, spec.to - spec.from, limits.pages);
      made(cache, () => cache.destroy());
      const memory = await createStageMemory(gpu, config, shape, limits, spec.last);
      made(memory, () => memory.destroy());
      const inputs = new StepBuffers(gpu, limits, tileRows(shape));
      made(inputs, () => inputs.destroy());
      const bound = await bindStage(
        { gpu, spec, shape, weights, inputs, memory, pages: cache.layers },
        onProgress,
      );
      made(bound, () => bound.destroy());
      const { leave } = bound.kernels;
      const outputBytes = "sampler" in leave
        ? leave.sampler.maxReadBytes
        : limits.maxRows * config.hiddenSize * 2;
      const readback = await Readback.create(gpu, outputBytes + 4 + GpuTimer.BYTES, IN_FLIGHT);
      made(readback, () => readback.destroy());
      const timer = gpu.timestamps ? new GpuTimer(gpu, IN_FLIGHT) : null;
      if (timer) made(timer, () => timer.destroy());
      gpu.check();
      const resources = { inputs, memory, cache, bound, readback, timer };
      return new StageModel(gpu, spec, resources, totalBytes(spec, weights, resources));
    } catch (error) {
      undo.reverse().forEach((destroy) => destroy());
      throw error;
    }
  }

  submit(batch: StepBatch, hidden: Uint16Array | null): Ticket {
    const { inputs, memory, bound, readback, timer } = this.#resources;
    invariant(this.#pending.length < IN_FLIGHT, `at most ${IN_FLIGHT} steps are in flight`);
    checkBatch(this.spec, batch, hidden);
    this.#head?.sampler.write(batch.requests, batch.rowPosition);
    if (hidden) this.#gpu.write(memory.buffers.frame, 0, hidden as Uint16Array<ArrayBuffer>);
    const step = inputs.write(batch);

    const id = this.#submitted++;
    const encoder = this.#gpu.device.createCommandEncoder({ label: `step ${id}` });
    const pass = encoder.beginComputePass({ timestampWrites: timer?.writes(id % IN_FLIGHT) });
    forward(pass, step, bound.kernels);
    pass.end();
    const ranges = this.#outputRanges(step.rows, batch.requests);
    if (timer) ranges.push(timer.resolve(encoder, id % IN_FLIGHT));
    const slot = readback.copy(encoder, ranges);
    this.#gpu.device.queue.submit([encoder.finish()]);

    const pending = new PendingStep(id, slot, step.rows, batch.requests, performance.now());
    this.#pending.push(pending);
    return pending;
  }

  async finish(ticket: Ticket): Promise<StageOutput> {
    const step = this.#pending[0];
    invariant(step === ticket, "steps are finished in the order of their submission");
    const { readback, timer } = this.#resources;
    const waitedFromMs = performance.now();
    let bytes: Uint8Array<ArrayBuffer>;
    try {
      bytes = await readback.read(step.slot);
    } finally {
      this.#pending.shift();
    }
    const doneMs = performance.now();
    const startedMs = Math.max(this.#idleSinceMs, step.submittedMs);
    const gpuMs = timer
      ? GpuTimer.elapsedMs(bytes.subarray(bytes.length - GpuTimer.BYTES))
      : doneMs - startedMs;
    this.#idleSinceMs = doneMs;
    return {
      ...this.#output(step, bytes),
      gpuMs,
      readbackMs: Math.max(0, doneMs - Math.max(waitedFromMs, startedMs + gpuMs)),
    };
  }

  destroy(): void {
    const { inputs, memory, cache, bound, readback, timer } = this.#resources;
    bound.destroy();
    inputs.destroy();
    memory.destroy();
    cache.destroy();
    readback.destroy();
    timer?.destroy();
  }

  #outputRanges(rows: number, requests: RowRequest[]): ReadRange[] {
    if (this.#head) return this.#head.sampler.ranges(requests);
    const bytes = Math.ceil(rows * this.spec.config.hiddenSize * 2 / 4) * 4;
    return [{ buffer: this.#resources.memory.buffers.frame, offset: 0, bytes }];
  }

  #output(
    step: PendingStep,
    bytes: Uint8Array<ArrayBuffer>,
  ): Pick<StageOutput, "hidden" | "results"> {
    if (this.#head) {
      return { hidden: null, results: this.#head.sampler.decode(bytes, step.requests) };
    }
    const elements = step.rows * this.spec.config.hiddenSize;
    return { hidden: new Uint16Array(bytes.buffer, bytes.byteOffset, elements), results: [] };
  }
}

function totalBytes(spec: StageSpec, weights: WeightStore, resources: StageResources): number {
  const { inputs, memory, cache, bound, readback } = resources;
  const { leave } = bound.kernels;
  const sampler = "sampler" in leave ? leave.sampler.memoryBytes : 0;
  return weights.bytesOfStage(spec) + inputs.bytes + memory.bytes + cache.bytes +
    bound.scratchBytes + sampler + readback.memoryBytes;
}
