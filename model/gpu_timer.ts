/**
 * GPU time of a pass by timestamp queries, read back with the step's outputs.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import type { ReadRange } from "../kernels/readback.ts";

/** Two timestamps of 64 bits. */
const BYTES = 16;
/** Where query results may be put in a buffer, a multiple of this (WebGPU). */
const RESOLVE_ALIGN = 256;

/** Times the passes of a step, for a bounded number of steps in flight. */
export class GpuTimer {
  /** Bytes that a step's timestamps add to its readback. */
  static readonly BYTES = BYTES;
  readonly #queries: GPUQuerySet;
  readonly #resolved: GPUBuffer;

  /** @param gpu one that has timestamps */
  constructor(gpu: Gpu, readonly slots: number) {
    this.#queries = gpu.device.createQuerySet({ type: "timestamp", count: 2 * slots });
    this.#resolved = gpu.buffer(
      "timestamps",
      slots * RESOLVE_ALIGN,
      GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC,
    );
  }

  /** For the first pass of a step. */
  begins(slot: number): GPUComputePassTimestampWrites {
    return { querySet: this.#queries, beginningOfPassWriteIndex: 2 * slot };
  }

  /** For the last pass of a step. */
  ends(slot: number): GPUComputePassTimestampWrites {
    return { querySet: this.#queries, endOfPassWriteIndex: 2 * slot + 1 };
  }

  /** After the pass; returns what to read back. */
  resolve(encoder: GPUCommandEncoder, slot: number): ReadRange {
    encoder.resolveQuerySet(this.#queries, 2 * slot, 2, this.#resolved, slot * RESOLVE_ALIGN);
    return { buffer: this.#resolved, offset: slot * RESOLVE_ALIGN, bytes: BYTES };
  }

  /** Milliseconds from what was read back; timestamps are nanoseconds. */
  static elapsedMs(bytes: Uint8Array): number {
    const view = new DataView(bytes.buffer, bytes.byteOffset, BYTES);
    const elapsedNs = view.getBigUint64(8, true) - view.getBigUint64(0, true);
    return Math.max(0, Number(BigInt.asIntN(64, elapsedNs)) / 1e6);
  }

  destroy(): void {
    this.#queries.destroy();
    this.#resolved.destroy();
  }
}
