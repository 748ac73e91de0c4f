/**
 * GPU time of compute passes, measured as they would run in earnest: a GPU lowers its clocks when it
 * idles for milliseconds, as it does while timestamps are fetched, so each figure is taken behind work
 * that keeps it busy.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import type { Gpu } from "./gpu.ts";

/** Passes whose median counts. */
const PASSES = 7;
const MOST_BUSY_PASSES = 300;

/** Times passes by timestamps, on a GPU that is kept busy. */
export class PassTimer {
  readonly #gpu: Gpu;
  readonly #queries: GPUQuerySet;
  readonly #resolved: GPUBuffer;
  readonly #busyMs: number;

  /**
   * @param busyMs GPU work ahead of the measured passes; none on a software adapter
   * @throws FleetError `gpu` without timestamp queries
   */
  constructor(gpu: Gpu, busyMs: number) {
    if (!gpu.timestamps) throw new FleetError("gpu", `${gpu.info.name} has no timestamp queries`);
    this.#gpu = gpu;
    this.#busyMs = gpu.info.software ? 0 : busyMs;
    this.#queries = gpu.device.createQuerySet({ type: "timestamp", count: 2 * PASSES });
    this.#resolved = gpu.buffer(
      "timestamps",
      16 * PASSES,
      GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC,
    );
  }

  /** The median microseconds of a pass. */
  async median(encode: (pass: GPUComputePassEncoder) => void): Promise<number> {
    const [first] = await this.#passes(encode);
    this.#keepBusy(encode, first);
    const times = await this.#passes(encode);
    return times.toSorted((a, b) => a - b)[PASSES >> 1];
  }

  destroy(): void {
    this.#queries.destroy();
    this.#resolved.destroy();
  }

  #keepBusy(encode: (pass: GPUComputePassEncoder) => void, microseconds: number): void {
    const passes = Math.min(MOST_BUSY_PASSES, Math.ceil(this.#busyMs * 1e3 / microseconds));
    for (let i = 0; i < passes; i++) {
      const encoder = this.#gpu.device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      encode(pass);
      pass.end();
      this.#gpu.device.queue.submit([encoder.finish()]);
    }
  }

  async #passes(encode: (pass: GPUComputePassEncoder) => void): Promise<number[]> {
    const encoder = this.#gpu.device.createCommandEncoder();
    for (let i = 0; i < PASSES; i++) {
      const pass = encoder.beginComputePass({
        timestampWrites: {
          querySet: this.#queries,
          beginningOfPassWriteIndex: 2 * i,
          endOfPassWriteIndex: 2 * i + 1,
        },
      });
      encode(pass);
      pass.end();
    }
    encoder.resolveQuerySet(this.#queries, 0, 2 * PASSES, this.#resolved, 0);
    this.#gpu.device.queue.submit([encoder.finish()]);
    const stamps = new BigUint64Array(await this.#gpu.read(this.#resolved, 16 * PASSES));
    return Array.from(
      { length: PASSES },
      (_, i) => Number(stamps[2 * i + 1] - stamps[2 * i]) / 1e3,
    );
  }
}
