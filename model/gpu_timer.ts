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

/** From the begin of a step's first pass to the end of its last one; the clock starts anywhere. */
export interface GpuSpan {
  beginNs: bigint;
  endNs: bigint;
}

/** Milliseconds from one timestamp to a later one; a clock that jumped back counts as none. */
export function elapsedMs(fromNs: bigint, toNs: bigint): number {
  return Math.max(0, Number(BigInt.asIntN(64, toNs - fromNs)) / 1e6);
}

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

  /** For a pass of a step, which may be its first, its last, or both. */
  writes(
    slot: number,
    { begins, ends }: { begins: boolean; ends: boolean },
  ): GPUComputePassTimestampWrites | undefined {
    if (!begins && !ends) return undefined;
    return {
      querySet: this.#queries,
      beginningOfPassWriteIndex: begins ? 2 * slot : undefined,
      endOfPassWriteIndex: ends ? 2 * slot + 1 : undefined,
    };
  }

  /** After the pass; returns what to read back. */
  resolve(encoder: GPUCommandEncoder, slot: number): ReadRange {
    encoder.resolveQuerySet(this.#queries, 2 * slot, 2, this.#resolved, slot * RESOLVE_ALIGN);
    return { buffer: this.#resolved, offset: slot * RESOLVE_ALIGN, bytes: BYTES };
  }

  /** The step's span on the GPU's clock, from what was read back. */
  static span(bytes: Uint8Array): GpuSpan {
    const view = new DataView(bytes.buffer, bytes.byteOffset, BYTES);
    return { beginNs: view.getBigUint64(0, true), endNs: view.getBigUint64(8, true) };
  }

  destroy(): void {
    this.#queries.destroy();
    this.#resolved.destroy();
  }
}
