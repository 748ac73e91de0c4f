/**
 * The KV pages of a stage: per layer a buffer of keys and one of values, allocated once.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import type { Gpu } from "../kernels/gpu.ts";
import { type HeadShape, kvPageBytes } from "../kernels/transformer/mod.ts";

/** One layer's pages, as `kernels/transformer/kv_layout.ts` lays them out. */
export interface LayerPages {
  keys: GPUBuffer;
  values: GPUBuffer;
}

/** The KV pages of consecutive layers. */
export class KvCache {
  readonly layers: readonly LayerPages[];
  readonly bytes: number;

  private constructor(layers: LayerPages[]) {
    this.layers = layers;
    this.bytes = layers.reduce((sum, { keys, values }) => sum + keys.size + values.size, 0);
  }

  /**
   * @throws FleetError `out-of-memory` when the GPU has no room, or a layer's pages exceed what it can
   * bind at once
   */
  static async create(gpu: Gpu, shape: HeadShape, layers: number, pages: number): Promise<KvCache> {
    const pageBytes = kvPageBytes(shape);
    const { maxStorageBufferBindingSize, maxBufferSize } = gpu.limits;
    const most = Math.floor(Math.min(maxStorageBufferBindingSize, maxBufferSize) / pageBytes);
    if (pages > most) {
      throw new FleetError(
        "out-of-memory",
        `${pages} KV pages of ${pageBytes} bytes a layer are asked for; ${gpu.info.name} can bind ` +
          `${most} at once`,
      );
    }
    return await gpu.allocate(
      `${pages} KV pages of ${layers} layers`,
      () =>
        new KvCache(Array.from({ length: layers }, () => ({
          keys: gpu.storage("keys", pages * pageBytes),
          values: gpu.storage("values", pages * pageBytes),
        }))),
    );
  }

  destroy(): void {
    for (const { keys, values } of this.layers) {
      keys.destroy();
      values.destroy();
    }
  }
}
