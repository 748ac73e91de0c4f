/**
 * A model of random weights that takes no disk and no host memory: matrices are made on the GPU, and
 * the rest is a small pool of random numbers, repeated.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import { canStack, syntheticCodes, syntheticDense } from "../kernels/linear/mod.ts";
import type { MatrixSource } from "../model/mod.ts";
import type { ModelConfig, TensorInfo, TensorSource } from "../shared/model_config.ts";
import { gaussian, seededRandom } from "../shared/random.ts";

const POOL_ELEMENTS = 2 ** 23;
const SEED = 1;

/** Matrices of random weights, made on the GPU. */
export function syntheticMatrices(gpu: Gpu): MatrixSource {
  let seed = SEED;
  return {
    matrix: (name, [n, k], format) =>
      format === null
        ? syntheticDense(gpu, name, n, k, seed++)
        : syntheticCodes(gpu, name, [n], k, format, seed++),
    canStack: (members) => canStack(members.map(({ n }) => n)),
    stack: (members, k, format) =>
      syntheticCodes(gpu, members[0].name, members.map(({ n }) => n), k, format, seed++),
  };
}

/** The norms (ones) and the embedding (a repeated pool of normal draws) of a model. */
export function syntheticTensors(config: ModelConfig): TensorSource {
  const { hiddenSize, vocabSize } = config;
  const describe = (name: string): TensorInfo =>
    name.includes("embed")
      ? { name, dtype: "F16", shape: [vocabSize, hiddenSize], bytes: vocabSize * hiddenSize * 2 }
      : { name, dtype: "F16", shape: [hiddenSize], bytes: hiddenSize * 2 };
  const ones = new Uint8Array(new Float16Array(hiddenSize).fill(1).buffer);
  let pool: Uint8Array<ArrayBuffer> | null = null;
  return {
    names: () => [],
    has: () => true,
    info: describe,
    read(name, offset, length) {
      if (!name.includes("embed")) return Promise.resolve(ones.slice(offset, offset + length));
      pool ??= randomPool();
      const out = new Uint8Array(length);
      for (let at = 0; at < length;) {
        const from = (offset + at) % pool.length;
        const count = Math.min(length - at, pool.length - from);
        out.set(pool.subarray(from, from + count), at);
        at += count;
      }
      return Promise.resolve(out);
    },
  };
}

function randomPool(): Uint8Array<ArrayBuffer> {
  const random = seededRandom(SEED);
  const draws = Float16Array.from({ length: 4096 }, () => gaussian(random));
  const pool = new Float16Array(POOL_ELEMENTS);
  for (let i = 0; i < pool.length; i++) pool[i] = draws[Math.floor(random() * draws.length)];
  return new Uint8Array(pool.buffer);
}
