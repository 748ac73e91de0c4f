/**
 * Writes a checkpoint's tensors into safetensors shards, tensor by tensor, without holding more than
 * one of them.
 *
 * The layout is planned first, so headers are written at once and tensors go to their places in any
 * order; a run that is cut short leaves no index, and no reader takes it for whole.
 *
 * @module
 */
import { encodeHeader } from "../shared/checkpoint/mod.ts";
import { invariant } from "../shared/errors.ts";
import type { TensorInfo } from "../shared/model_config.ts";

/** Where files go. */
export interface FileSink {
  /** Writes bytes at an offset of a file, which is made when it is not there. */
  write(name: string, offset: number, bytes: Uint8Array): Promise<void>;
}

/** A shard and what lies in it. */
interface Shard {
  file: string;
  tensors: TensorInfo[];
}

/**
 * Cuts a list of tensors into shards, in order. A tensor larger than a shard gets one of its own.
 *
 * @param maxShardBytes of tensors in one shard
 */
export function planShards(tensors: readonly TensorInfo[], maxShardBytes: number): Shard[] {
  const cuts: TensorInfo[][] = [];
  let bytes = Infinity;
  for (const tensor of tensors) {
    if (bytes + tensor.bytes > maxShardBytes) {
      cuts.push([]);
      bytes = 0;
    }
    cuts.at(-1)!.push(tensor);
    bytes += tensor.bytes;
  }
  const number = (value: number) => String(value).padStart(5, "0");
  return cuts.map((cut, index) => ({
    file: `model-${number(index + 1)}-of-${number(cuts.length)}.safetensors`,
    tensors: cut,
  }));
}

/** A checkpoint's shards being written. */
export interface ShardWriter {
  /** Writes one tensor, all of it: at once, or in slices that follow each other. */
  write(name: string, data: Uint8Array | AsyncIterable<Uint8Array>): Promise<void>;
  /** Writes the index. Every tensor must have been written. */
  finish(): Promise<void>;
}

/**
 * Begins to write shards.
 *
 * @param tensors all that will be written
 */
export async function createShardWriter(
  sink: FileSink,
  tensors: readonly TensorInfo[],
  maxShardBytes: number,
): Promise<ShardWriter> {
  const places = new Map<string, { file: string; offset: number; bytes: number }>();
  const weightMap: Record<string, string> = {};
  for (const { file, tensors: inside } of planShards(tensors, maxShardBytes)) {
    const header = encodeHeader(inside);
    await sink.write(file, 0, header);
    let offset = header.length;
    for (const { name, bytes } of inside) {
      places.set(name, { file, offset, bytes });
      weightMap[name] = file;
      offset += bytes;
    }
  }
  return {
    async write(name, data) {
      const place = places.get(name);
      invariant(place, `${name} is planned, and not written yet`);
      let written = 0;
      for await (const slice of data instanceof Uint8Array ? [data] : data) {
        invariant(written + slice.length <= place.bytes, `${name} has at most the planned size`);
        await sink.write(place.file, place.offset + written, slice);
        written += slice.length;
      }
      invariant(written === place.bytes, `${name} has the planned size`);
      places.delete(name);
    },
    async finish() {
      invariant(places.size === 0, `every tensor is written; missing: ${[...places.keys()]}`);
      const index = {
        metadata: { total_size: tensors.reduce((sum, tensor) => sum + tensor.bytes, 0) },
        weight_map: weightMap,
      };
      const text = JSON.stringify(index, null, 2) + "\n";
      await sink.write("model.safetensors.index.json", 0, new TextEncoder().encode(text));
    },
  };
}
