/**
 * What the checks of the self-test have in common: their shape, and a place to run kernels in.
 *
 * @module
 */
import type { Gpu } from "../gpu.ts";
import type { StepShape } from "../kernel.ts";

/** What a kernel computed on fixed inputs, beside what it should have. */
export interface Comparison {
  /** The kernel and its variant, for the message. */
  kernel: string;
  actual: ArrayLike<number>;
  expected: ArrayLike<number>;
  /** How far `actual[i]` may be from `expected[i]`. */
  tolerance: (i: number) => number;
  /** All bytes that the kernel wrote, for the digest. */
  raw: ArrayBuffer;
}

/** Runs kernels of one family on small fixed inputs. */
export type Check = (bench: CheckBench) => Promise<Comparison[]>;

/** Buffers that live as long as a check, and one step on them. */
export class CheckBench {
  readonly gpu: Gpu;
  readonly #destroy: (() => void)[] = [];

  constructor(gpu: Gpu) {
    this.gpu = gpu;
  }

  /** A storage buffer that goes with the check. */
  storage(label: string, bytes: number): GPUBuffer {
    return this.keep(this.gpu.storage(label, bytes));
  }

  /** A storage buffer that holds `data` and goes with the check. */
  upload(label: string, data: ArrayBufferView<ArrayBuffer>): GPUBuffer {
    return this.keep(this.gpu.upload(label, data));
  }

  /** Destroys `resource` with the check. */
  keep<T extends { destroy(): void }>(resource: T): T {
    this.#destroy.push(() => resource.destroy());
    return resource;
  }

  /** Runs kernels one after the other in one pass. */
  run<S extends StepShape>(
    shape: S,
    ...kernels: { encode: (pass: GPUComputePassEncoder, shape: S) => void }[]
  ): void {
    const encoder = this.gpu.device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    for (const kernel of kernels) kernel.encode(pass, shape);
    pass.end();
    this.gpu.device.queue.submit([encoder.finish()]);
  }

  destroy(): void {
    for (const destroy of this.#destroy.splice(0)) destroy();
  }
}

/** Tolerance of a value that is stored as float16 after float32 arithmetic. */
export function float16Tolerance(expected: ArrayLike<number>): (i: number) => number {
  return (i) => 1e-4 + Math.abs(expected[i]) * 2 ** -10;
}
