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
import {
  headShape,
  StepBuffers,
  tileRows,
  type TransformerShape,
} from "../kernels/transformer/mod.ts";
import { checkBatch } from "./check_batch.ts";
import { forwardLayers, forwardOutputs, type HeadKernels } from "./forward.ts";
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
  /** The last step's counts, and whether the one before it had the same. */
  #counts: TransformerShape | null = null;
  #repeats = false;
  /** The next step's layers, if it has these counts. */
  #prepared: { counts: TransformerShape; commands: GPUCommandBuffer } | null = null;
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

    const counts = dispatchCounts(step);
    const layers = this.#prepared && sameCounts(this.#prepared.counts, counts)
      ? this.#prepared.commands
      : this.#encodeLayers(counts);
    this.#prepared = null;
    this.#repeats = this.#counts !== null && sameCounts(this.#counts, counts);
    this.#counts = counts;

    const id = this.#submitted++;
    const encoder = this.#gpu.device.createCommandEncoder({ label: `outputs of step ${id}` });
    const pass = encoder.beginComputePass({ timestampWrites: timer?.ends(id % IN_FLIGHT) });
    forwardOutputs(pass, step, bound.kernels);
    pass.end();
    const ranges = this.#outputRanges(step.rows, batch.requests);
    if (timer) ranges.push(timer.resolve(encoder, id % IN_FLIGHT));
    const slot = readback.copy(encoder, ranges);
    this.#gpu.device.queue.submit([layers, encoder.finish()]);

    const pending = new PendingStep(id, slot, step.rows, batch.requests, performance.now());
    this.#pending.push(pending);
    return pending;
  }

  async finish(ticket: Ticket): Promise<StageOutput> {
    const step = this.#pending[0];
    invariant(step === ticket, "steps are finished in the order of their submission");
    const { readback, timer } = this.#resources;
    this.#prepare();
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

  /**
   * Encodes the layers of the next step while the GPU is at work, where it looks like the last ones:
   * sequences that decode bring the same counts step after step.
   */
  #prepare(): void {
    if (!this.#repeats || this.#prepared !== null || this.#counts === null) return;
    this.#prepared = { counts: this.#counts, commands: this.#encodeLayers(this.#counts) };
  }

  /** The layers of step {@linkcode #submitted}, the next one. */
  #encodeLayers(counts: TransformerShape): GPUCommandBuffer {
    const { bound, timer } = this.#resources;
    const id = this.#submitted;
    const encoder = this.#gpu.device.createCommandEncoder({ label: `layers of step ${id}` });
    const pass = encoder.beginComputePass({ timestampWrites: timer?.begins(id % IN_FLIGHT) });
    forwardLayers(pass, counts, bound.kernels);
    pass.end();
    return encoder.finish();
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

/** Context lengths are told apart in steps of this much: what is past a row's position ends at once. */
const CONTEXT_STEP = 256;

/** What decides the dispatches of a step's layers. */
function dispatchCounts(step: TransformerShape): TransformerShape {
  const contextTokens = Math.ceil(step.contextTokens / CONTEXT_STEP) * CONTEXT_STEP;
  return { ...step, outputs: 0, contextTokens };
}

function sameCounts(a: TransformerShape, b: TransformerShape): boolean {
  return a.decodeRows === b.decodeRows && a.rows === b.rows &&
    a.prefillTiles === b.prefillTiles && a.contextTokens === b.contextTokens;
}

function totalBytes(spec: StageSpec, weights: WeightStore, resources: StageResources): number {
  const { inputs, memory, cache, bound, readback } = resources;
  const { leave } = bound.kernels;
  const sampler = "sampler" in leave ? leave.sampler.memoryBytes : 0;
  return weights.bytesOfStage(spec) + inputs.bytes + memory.bytes + cache.bytes +
    bound.scratchBytes + sampler + readback.memoryBytes;
}
