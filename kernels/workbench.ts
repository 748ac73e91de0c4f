/**
 * A place to run kernels in for a moment: self-test and calibration.
 *
 * @module
 */
import type { Gpu } from "./gpu.ts";
import type { StepShape } from "./kernel.ts";

/** Buffers that go when the work is done, and passes on them. */
export class Workbench {
  readonly gpu: Gpu;
  readonly #destroy: (() => void)[] = [];

  constructor(gpu: Gpu) {
    this.gpu = gpu;
  }

  /** A storage buffer that goes with the bench. */
  storage(label: string, bytes: number): GPUBuffer {
    return this.keep(this.gpu.storage(label, bytes));
  }

  /** A storage buffer that holds `data` and goes with the bench. */
  upload(label: string, data: ArrayBufferView<ArrayBuffer>): GPUBuffer {
    return this.keep(this.gpu.upload(label, data));
  }

  /** Destroys `resource` with the bench. */
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

  /** Frees everything; idempotent. */
  destroy(): void {
    for (const destroy of this.#destroy.splice(0)) destroy();
  }
}
