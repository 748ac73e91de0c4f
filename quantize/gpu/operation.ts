/**
 * Operations recorded once and run many times: dispatches with their constants in a uniform, copies
 * between buffers, and lists of both.
 *
 * @module
 */
import { FleetError, invariant } from "../../shared/errors.ts";
import type { Gpu } from "../../kernels/gpu.ts";

/** Something the GPU does; recorded with its buffers bound. */
export type Operation =
  | {
    type: "dispatch";
    pipeline: GPUComputePipeline;
    bindGroup: GPUBindGroup;
    workgroups: readonly [x: number, y: number, z: number];
    /** Floating-point operations, of kernels that take long; 0 of the others. */
    work: number;
  }
  | {
    type: "copy";
    from: GPUBuffer;
    fromOffset: number;
    to: GPUBuffer;
    toOffset: number;
    bytes: number;
  };

/** A constant of a dispatch: an unsigned integer, or a float where it is wrapped. */
export type Constant = number | { f32: number };

/** What a dispatch runs: binding 0 is the uniform of `constants`, then come the buffers in order. */
export interface DispatchRequest {
  label: string;
  code: string;
  entryPoint?: string;
  constants: Constant[];
  buffers: GPUBuffer[];
  /** Binding numbers of the buffers, where they are not 1, 2, ... */
  bindings?: readonly number[];
  workgroups: readonly [x: number, y?: number, z?: number];
  /** Floating-point operations, where they take long. */
  work?: number;
}

/**
 * Work of a submission: a fraction of a second on a GPU of 10 TFLOP/s. Drivers that also draw a
 * screen end what holds the GPU for seconds.
 */
const SUBMIT_WORK = 4e12;
/** Work that may wait on the GPU; wgpu takes a GPU for stuck after a minute. */
const QUEUED_WORK = 5e13;
/** Work that is waited for where time is taken: what is less is not worth the 10 ms of a wait. */
const TIMED_WORK = 1e11;
/** Written data that may be on its way: it has a copy of its own until the GPU has taken it. */
const WRITTEN_BYTES = 2 ** 28;

/** Bytes of all buffers that recorders hold on a GPU, now and at their most. */
export interface HeldMemory {
  bytes: number;
  peakBytes: number;
}

const held = new WeakMap<Gpu, HeldMemory>();

/** What recorders hold on a GPU. */
export function heldMemory(gpu: Gpu): HeldMemory {
  let memory = held.get(gpu);
  if (!memory) held.set(gpu, memory = { bytes: 0, peakBytes: 0 });
  return memory;
}

/** Workgroups along x of a one-dimensional kernel; the rest goes along y (a dimension ends at 65535). */
export const LINE_WORKGROUPS = 32_768;

/** Workgroups of a kernel that takes `threads` of `size` a workgroup, as x and y. */
export function lineWorkgroups(threads: number, size = 256): [x: number, y: number] {
  const groups = Math.ceil(threads / size);
  return [Math.min(groups, LINE_WORKGROUPS), Math.ceil(groups / LINE_WORKGROUPS)];
}

/** Records operations on one GPU, and owns the buffers made through it. */
export class Recorder {
  readonly gpu: Gpu;
  /** Bytes of all buffers that live. */
  bytes = 0;
  readonly #owned = new Set<GPUBuffer>();
  #unused: GPUBuffer | null = null;
  #queuedWork = 0;
  #writtenBytes = 0;

  constructor(gpu: Gpu) {
    this.gpu = gpu;
  }

  /**
   * A storage buffer of `count` four-byte elements.
   *
   * @throws FleetError `out-of-memory` when no kernel could bind it on this GPU
   */
  buffer(label: string, count: number): GPUBuffer {
    this.#checkSize(label, count * 4);
    return this.#own(this.gpu.storage(label, count * 4));
  }

  /** A storage buffer that holds `data`. */
  upload(label: string, data: Float32Array<ArrayBuffer> | Uint32Array<ArrayBuffer>): GPUBuffer {
    this.#checkSize(label, data.byteLength);
    this.#writtenBytes += data.byteLength;
    return this.#own(this.gpu.upload(label, data));
  }

  /** Writes `data` from element `at` on, piece by piece: no more than one waits beside the buffer. */
  async fill(buffer: GPUBuffer, data: Float32Array<ArrayBuffer>, at = 0): Promise<void> {
    const step = WRITTEN_BYTES / 4;
    for (let first = 0; first < data.length; first += step) {
      const piece = data.subarray(first, first + step);
      this.gpu.write(buffer, (at + first) * 4, piece);
      this.#writtenBytes += piece.byteLength;
      await this.flush();
    }
  }

  /** Waits until the GPU has taken what was written, where it is much. */
  async flush(): Promise<void> {
    if (this.#writtenBytes < WRITTEN_BYTES) return;
    this.gpu.device.queue.submit([]);
    await this.#wait();
  }

  /** Bound where a kernel has an input that this use of it does not read. */
  get unused(): GPUBuffer {
    return this.#unused ??= this.buffer("unused", 4);
  }

  async dispatch(request: DispatchRequest): Promise<Operation> {
    const { label, code, entryPoint = "main", constants, buffers } = request;
    const pipeline = await this.gpu.pipeline({ label, code, entryPoint });
    const words = new Uint32Array(Math.ceil(constants.length / 4) * 4);
    const floats = new Float32Array(words.buffer);
    constants.forEach((constant, i) => {
      if (typeof constant === "number") words[i] = constant;
      else floats[i] = constant.f32;
    });
    const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
    const uniform = this.#own(this.gpu.buffer(`${label} constants`, words.byteLength, usage));
    this.gpu.write(uniform, 0, words);
    const bindGroup = this.gpu.device.createBindGroup({
      label,
      layout: pipeline.getBindGroupLayout(0),
      entries: [
        { binding: 0, resource: { buffer: uniform } },
        ...buffers.map((buffer, i) => ({
          binding: request.bindings?.[i] ?? i + 1,
          resource: { buffer },
        })),
      ],
    });
    const [x, y = 1, z = 1] = request.workgroups;
    invariant(Math.max(x, y, z) <= 65535, `${label} fits a dispatch: ${x} x ${y} x ${z}`);
    return {
      type: "dispatch",
      pipeline,
      bindGroup,
      workgroups: [x, y, z],
      work: request.work ?? 0,
    };
  }

  /** Copies `count` four-byte elements. */
  copy(from: GPUBuffer, to: GPUBuffer, count: number, fromAt = 0, toAt = 0): Operation {
    return {
      type: "copy",
      from,
      fromOffset: fromAt * 4,
      to,
      toOffset: toAt * 4,
      bytes: count * 4,
    };
  }

  /** Queues operations, in order. */
  run(operations: readonly Operation[]): void {
    const { device } = this.gpu;
    let encoder = device.createCommandEncoder();
    let pass: GPUComputePassEncoder | null = null;
    let work = 0;
    const submit = () => {
      pass?.end();
      pass = null;
      device.queue.submit([encoder.finish()]);
      this.#queuedWork += work;
      work = 0;
    };
    for (const operation of operations) {
      if (work >= SUBMIT_WORK) {
        submit();
        encoder = device.createCommandEncoder();
      }
      if (operation.type === "dispatch") {
        pass ??= encoder.beginComputePass();
        pass.setPipeline(operation.pipeline);
        pass.setBindGroup(0, operation.bindGroup);
        pass.dispatchWorkgroups(...operation.workgroups);
        work += operation.work;
      } else {
        pass?.end();
        pass = null;
        const { from, fromOffset, to, toOffset, bytes } = operation;
        encoder.copyBufferToBuffer(from, fromOffset, to, toOffset, bytes);
      }
    }
    submit();
  }

  /** Waits for the GPU when much is queued; loops that only queue call it each time round. */
  async pace(): Promise<void> {
    if (this.#queuedWork >= QUEUED_WORK) await this.#wait();
  }

  /** Waits for the GPU when what is queued would distort a time that is taken now. */
  async settle(): Promise<void> {
    if (this.#queuedWork >= TIMED_WORK) await this.#wait();
  }

  /** Floats of a buffer. */
  async floats(buffer: GPUBuffer, count: number): Promise<Float32Array<ArrayBuffer>> {
    return new Float32Array(await this.#read(buffer, count));
  }

  /** Words of a buffer. */
  async words(buffer: GPUBuffer, count: number): Promise<Uint32Array<ArrayBuffer>> {
    return new Uint32Array(await this.#read(buffer, count));
  }

  /** Frees every buffer; idempotent. */
  destroy(): void {
    for (const buffer of this.#owned) buffer.destroy();
    this.#owned.clear();
    heldMemory(this.gpu).bytes -= this.bytes;
    this.bytes = 0;
  }

  async #read(buffer: GPUBuffer, count: number): Promise<ArrayBuffer> {
    const bytes = await this.gpu.read(buffer, count * 4);
    this.#queuedWork = this.#writtenBytes = 0;
    return bytes;
  }

  async #wait(): Promise<void> {
    await this.gpu.device.queue.onSubmittedWorkDone();
    this.#queuedWork = this.#writtenBytes = 0;
    this.gpu.check();
  }

  #checkSize(label: string, bytes: number): void {
    const { maxStorageBufferBindingSize, maxBufferSize } = this.gpu.limits;
    const most = Math.min(maxStorageBufferBindingSize, maxBufferSize);
    if (bytes <= most) return;
    const gib = (size: number) => `${(size / 2 ** 30).toFixed(2)} GiB`;
    throw new FleetError(
      "out-of-memory",
      `${label} takes ${gib(bytes)} in one buffer; ${this.gpu.info.name} allows ${gib(most)}`,
    );
  }

  #own(buffer: GPUBuffer): GPUBuffer {
    this.#owned.add(buffer);
    this.bytes += buffer.size;
    const memory = heldMemory(this.gpu);
    memory.bytes += buffer.size;
    memory.peakBytes = Math.max(memory.peakBytes, memory.bytes);
    return buffer;
  }
}
