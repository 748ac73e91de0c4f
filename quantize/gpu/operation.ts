/**
 * Operations recorded once and run many times: dispatches with their constants in a uniform, copies
 * between buffers, and lists of both.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { Gpu } from "../../kernels/gpu.ts";

/** Something the GPU does; recorded with its buffers bound. */
export type Operation =
  | {
    type: "dispatch";
    pipeline: GPUComputePipeline;
    bindGroup: GPUBindGroup;
    workgroups: readonly [x: number, y: number, z: number];
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

  constructor(gpu: Gpu) {
    this.gpu = gpu;
  }

  /** A storage buffer of `count` four-byte elements. */
  buffer(label: string, count: number): GPUBuffer {
    return this.#own(this.gpu.storage(label, count * 4));
  }

  /** A storage buffer that holds `data`. */
  upload(label: string, data: Float32Array<ArrayBuffer> | Uint32Array<ArrayBuffer>): GPUBuffer {
    return this.#own(this.gpu.upload(label, data));
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
    return { type: "dispatch", pipeline, bindGroup, workgroups: [x, y, z] };
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
    const encoder = this.gpu.device.createCommandEncoder();
    let pass: GPUComputePassEncoder | null = null;
    for (const operation of operations) {
      if (operation.type === "dispatch") {
        pass ??= encoder.beginComputePass();
        pass.setPipeline(operation.pipeline);
        pass.setBindGroup(0, operation.bindGroup);
        pass.dispatchWorkgroups(...operation.workgroups);
      } else {
        pass?.end();
        pass = null;
        const { from, fromOffset, to, toOffset, bytes } = operation;
        encoder.copyBufferToBuffer(from, fromOffset, to, toOffset, bytes);
      }
    }
    pass?.end();
    this.gpu.device.queue.submit([encoder.finish()]);
  }

  /** Floats of a buffer. */
  async floats(buffer: GPUBuffer, count: number): Promise<Float32Array<ArrayBuffer>> {
    return new Float32Array(await this.gpu.read(buffer, count * 4));
  }

  /** Words of a buffer. */
  async words(buffer: GPUBuffer, count: number): Promise<Uint32Array<ArrayBuffer>> {
    return new Uint32Array(await this.gpu.read(buffer, count * 4));
  }

  /** Frees every buffer; idempotent. */
  destroy(): void {
    for (const buffer of this.#owned) buffer.destroy();
    this.#owned.clear();
    this.bytes = 0;
  }

  #own(buffer: GPUBuffer): GPUBuffer {
    this.#owned.add(buffer);
    this.bytes += buffer.size;
    return buffer;
  }
}
