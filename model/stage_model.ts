/**
 * A stage on the GPU: steps in, activations or results out.
 *
 * A wait for the GPU waits for all that has been submitted (`readback.ts`). So a step that comes while
 * another one runs is checked, written and encoded at once, but submitted only when the wait for the
 * older one is over, before anything else: the GPU idles for as long as it takes to wake and to submit
 * the step's first layer (`step_parts.ts`), and the older step's outputs are not held up. Inputs
 * may be written while the older step runs: `queue.writeBuffer` is ordered with submits. There is one
 * such step at most, for its writes would overwrite those of a second one.
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
import { forwardEntry, forwardLayers, forwardOutputs, type HeadKernels } from "./forward.ts";
import { elapsedMs, type GpuSpan, GpuTimer } from "./gpu_timer.ts";
import { KvCache } from "./kv_cache.ts";
import { createStageMemory, type StageMemory } from "./stage_buffers.ts";
import { bindStage, type BoundStage } from "./stage_kernels.ts";
import type { StageOutput, StageProgress, StageSpec, StageSteps, Ticket } from "./stage_spec.ts";
import { type LayerRun, stepParts } from "./step_parts.ts";
import { StepTimes } from "./step_times.ts";
import type { WeightStore } from "./weights.ts";

const IN_FLIGHT = LIMITS.maxStepsInFlightPerStage;
/**
 * The next step is encoded ahead once as many were alike. What was encoded in vain can be given back
 * by nobody but the garbage collector, which does not know how much memory hangs on it: several MB of
 * a long stage's.
 */
const ALIKE_STEPS = 8;
/** How long before a step's end one should turn to it: timers wake a tenth of a millisecond late. */
const WAKE_MS = 0.15;

/** Everything a stage holds on the GPU beside its weights. */
interface StageResources {
  inputs: StepBuffers;
  memory: StageMemory;
  cache: KvCache;
  bound: BoundStage;
  readback: Readback;
  timer: GpuTimer | null;
}

/** An unfinished step. */
class PendingStep implements Ticket {
  /** Where its outputs will be read; set once its last commands are encoded. */
  slot: ReadSlot | null = null;
  /** Encoded, and submitted when the step before it is done; empty once they are. */
  waiting: GPUCommandBuffer[] = [];
  /** When it was submitted. */
  startedMs = Infinity;

  constructor(
    readonly id: number,
    readonly counts: TransformerShape,
    readonly requests: RowRequest[],
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
  readonly #parts: LayerRun[];
  readonly #times = new StepTimes();
  /** Oldest first. */
  readonly #pending: PendingStep[] = [];
  #submitted = 0;
  /** The last step's counts, and how many steps in a row have had them. */
  #counts: TransformerShape | null = null;
  #alike = 0;
  /** The next step's parts but the last, if it has these counts. */
  #prepared: { counts: TransformerShape; commands: GPUCommandBuffer[] } | null = null;
  /** When the GPU was last seen to have finished a step, and the step's span. */
  #idleSinceMs = 0;
  #lastSpan: GpuSpan | null = null;

  private constructor(gpu: Gpu, spec: StageSpec, resources: StageResources, memoryBytes: number) {
    this.#gpu = gpu;
    this.spec = spec;
    this.#resources = resources;
    this.memoryBytes = memoryBytes;
    const { leave } = resources.bound.kernels;
    this.#head = "sampler" in leave ? leave : null;
    this.#parts = stepParts(spec.to - spec.from);
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
    const { inputs, memory, readback } = this.#resources;
    invariant(this.#pending.length < IN_FLIGHT, `at most ${IN_FLIGHT} steps are in flight`);
    const held = this.#pending.some(({ waiting }) => waiting.length > 0);
    invariant(!held, "no step's inputs are overwritten before all of its parts are submitted");
    checkBatch(this.spec, batch, hidden);
    this.#head?.sampler.write(batch.requests, batch.rowPosition);
    if (hidden) this.#gpu.write(memory.buffers.frame, 0, hidden as Uint16Array<ArrayBuffer>);
    const counts = inputs.write(batch);
    this.#alike = this.#counts && sameCounts(this.#counts, counts) ? this.#alike + 1 : 1;
    this.#counts = counts;

    const step = new PendingStep(this.#submitted++, counts, batch.requests);
    const commands = this.#encode(step);
    // What is encoded first is submitted first: the GPU is at work while the rest is encoded.
    if (this.#pending.length === 0 || !readback.immediate) this.#start(step, commands);
    else step.waiting = [...commands];
    this.#pending.push(step);
    return step;
  }

  prepare(): void {
    if (this.#alike < ALIKE_STEPS || this.#prepared !== null || this.#counts === null) return;
    const counts = this.#counts;
    const commands = this.#parts.slice(0, -1)
      .map((part) => this.#encodeLayers(this.#submitted, counts, part));
    this.#prepared = { counts, commands };
  }

  /** An empty submit makes wgpu look which submissions are done, and drop its account of them. */
  settle(): void {
    if (!this.#gpu.info.software) this.#gpu.device.queue.submit([]);
  }

  busyForMs(): number {
    const [step] = this.#pending;
    // One that still waits to be submitted though it is the oldest: reading the one before it failed.
    if (!step || step.waiting.length > 0) return 0;
    return step.startedMs + this.#times.surelyMs(step.counts) - WAKE_MS - performance.now();
  }

  async finish(ticket: Ticket): Promise<StageOutput> {
    const [step] = this.#pending;
    invariant(step === ticket && step.slot, "steps are finished in the order of their submission");
    const { readback, timer } = this.#resources;
    const waitedFromMs = performance.now();
    let doneMs = waitedFromMs;
    let bytes: Uint8Array<ArrayBuffer>;
    try {
      bytes = await readback.read(step.slot, () => {
        doneMs = performance.now();
        // From here on the GPU has nothing to do but the next step, which may come while this read
        // still lets the event loop turn.
        this.#pending.shift();
        const next = this.#pending.at(0);
        if (next && next.waiting.length > 0) this.#start(next, next.waiting.splice(0));
      });
    } finally {
      if (this.#pending[0] === step) this.#pending.shift();
    }
    const times = timer
      ? this.#timesOf(step, GpuTimer.span(bytes.subarray(bytes.length - GpuTimer.BYTES)), doneMs)
      : { gpuMs: doneMs - Math.max(this.#idleSinceMs, step.startedMs) };
    const startedMs = Math.max(this.#idleSinceMs, step.startedMs);
    this.#idleSinceMs = doneMs;
    const readMs = performance.now();
    return {
      ...this.#output(step, bytes),
      ...times,
      readbackMs: Math.max(0, readMs - Math.max(waitedFromMs, startedMs + times.gpuMs)),
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

  #start(step: PendingStep, commands: Iterable<GPUCommandBuffer>): void {
    const { queue } = this.#gpu.device;
    step.startedMs = performance.now();
    // While a software adapter works, a second submit would wait for the end of the first one.
    if (this.#gpu.info.software) queue.submit([...commands]);
    else for (const part of commands) queue.submit([part]);
  }

  /** The step's parts, in order; those encoded ahead if they fit. */
  *#encode(step: PendingStep): Generator<GPUCommandBuffer, void> {
    const prepared = this.#prepared && sameCounts(this.#prepared.counts, step.counts)
      ? this.#prepared.commands
      : [];
    this.#prepared = null;
    for (const [i, part] of this.#parts.slice(0, -1).entries()) {
      yield prepared[i] ?? this.#encodeLayers(step.id, step.counts, part);
    }
    yield this.#encodeLast(step);
  }

  /** Layers of step `id`, and what comes before its first one. */
  #encodeLayers(id: number, counts: TransformerShape, part: LayerRun): GPUCommandBuffer {
    const label = `layers from ${part.from} of step ${id}`;
    const encoder = this.#gpu.device.createCommandEncoder({ label });
    this.#encodePass(encoder, id, counts, part);
    return encoder.finish();
  }

  #encodePass(
    encoder: GPUCommandEncoder,
    id: number,
    counts: TransformerShape,
    part: LayerRun,
    outputs?: TransformerShape,
  ): void {
    const { bound: { kernels }, timer } = this.#resources;
    const slot = id % IN_FLIGHT;
    const first = part.from === 0;
    const timestampWrites = timer?.writes(slot, { begins: first, ends: outputs !== undefined });
    const pass = encoder.beginComputePass({ timestampWrites });
    if (first) forwardEntry(pass, counts, kernels);
    forwardLayers(pass, counts, kernels.layers.slice(part.from, part.to));
    if (outputs) forwardOutputs(pass, outputs, kernels);
    pass.end();
  }

  /** The step's last layers, its outputs, and the copy to where they are read. */
  #encodeLast(step: PendingStep): GPUCommandBuffer {
    const { readback, timer } = this.#resources;
    const encoder = this.#gpu.device.createCommandEncoder({ label: `outputs of step ${step.id}` });
    this.#encodePass(encoder, step.id, step.counts, this.#parts.at(-1)!, step.counts);
    const ranges = this.#outputRanges(step.counts.rows, step.requests);
    if (timer) ranges.push(timer.resolve(encoder, step.id % IN_FLIGHT));
    step.slot = readback.copy(encoder, ranges);
    return encoder.finish();
  }

  /** @param doneMs when the GPU was seen to be done: whatever its clock says, it took no longer */
  #timesOf(
    step: PendingStep,
    span: GpuSpan,
    doneMs: number,
  ): Pick<StageOutput, "gpuMs" | "gpuIdleMs"> {
    const gpuMs = Math.min(elapsedMs(span.beginNs, span.endNs), doneMs - step.startedMs);
    const gpuIdleMs = this.#lastSpan ? elapsedMs(this.#lastSpan.endNs, span.beginNs) : undefined;
    this.#lastSpan = span;
    this.#times.record(step.counts, gpuMs);
    return { gpuMs, gpuIdleMs };
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
    const elements = step.counts.rows * this.spec.config.hiddenSize;
    return { hidden: new Uint16Array(bytes.buffer, bytes.byteOffset, elements), results: [] };
  }
}

function sameCounts(a: TransformerShape, b: TransformerShape): boolean {
  return a.decodeRows === b.decodeRows && a.rows === b.rows && a.outputs === b.outputs &&
    a.prefillTiles === b.prefillTiles && a.contextTokens === b.contextTokens;
}

function totalBytes(spec: StageSpec, weights: WeightStore, resources: StageResources): number {
  const { inputs, memory, cache, bound, readback } = resources;
  const { leave } = bound.kernels;
  const sampler = "sampler" in leave ? leave.sampler.memoryBytes : 0;
  return weights.bytesOfStage(spec) + inputs.bytes + memory.bytes + cache.bytes +
    bound.scratchBytes + sampler + readback.memoryBytes;
}
