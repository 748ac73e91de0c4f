/**
 * Matrices of seeded random numbers as a checkpoint would hold them, for tests, self-test, calibration
 * and benchmarks.
 *
 * @module
 */
import { FleetError, invariant } from "../../shared/errors.ts";
import type { CodeGemmFormat, DType, TensorInfo, TensorSource } from "../../shared/model_config.ts";
import { codesPerWord, DTYPE_BYTES, matrixFormat } from "../../shared/model_config.ts";
import { gaussian, seededRandom } from "../../shared/random.ts";
import type { MatrixShape } from "./types.ts";

/**
 * The tensors of one matrix, `NAME.codes`, `.codebooks` and `.scales`, or a float16 `NAME.weight`.
 * Values are drawn when read, each from its own place, so any slicing reads the same; they are scaled
 * so that inputs of unit variance give outputs of about unit variance.
 *
 * @param seed any 32-bit integer
 */
export function randomTensors(
  name: string,
  [n, k]: MatrixShape,
  format: CodeGemmFormat | null,
  seed: number,
): TensorSource {
  const unit = 1 / Math.sqrt(k);
  const tensors = format === null
    ? [weights(`${name}.weight`, [n, k], seed, unit)]
    : codeTensors(name, [n, k], matrixFormat(format, k), seed, unit);
  const byName = new Map(tensors.map((tensor) => [tensor.info.name, tensor]));
  const find = (tensor: string) => {
    const found = byName.get(tensor);
    if (!found) throw new FleetError("bad-checkpoint", `There is no tensor ${tensor}`);
    return found;
  };
  return {
    names: () => [...byName.keys()],
    has: (tensor) => byName.has(tensor),
    info: (tensor) => find(tensor).info,
    read: (tensor, offset, length) => Promise.resolve(find(tensor).read(offset, length)),
  };
}

function codeTensors(
  name: string,
  [n, k]: MatrixShape,
  format: CodeGemmFormat,
  seed: number,
  unit: number,
): RandomTensor[] {
  const { m, v, g, b } = format;
  return [
    codes(`${name}.codes`, [m, k / v / codesPerWord(format), n], seed),
    weights(`${name}.codebooks`, [m, 2 ** b, v], seed + 1, 1 / Math.sqrt(m)),
    scales(`${name}.scales`, [k / g, n], seed + 2, unit),
  ];
}

interface RandomTensor {
  info: TensorInfo;
  read(offset: number, length: number): Uint8Array<ArrayBuffer>;
}

function describe(name: string, dtype: DType, shape: number[]): TensorInfo {
  return { name, dtype, shape, bytes: shape.reduce((a, b) => a * b, DTYPE_BYTES[dtype]) };
}

/** Words of random codes. */
function codes(name: string, shape: number[], seed: number): RandomTensor {
  return {
    info: describe(name, "I32", shape),
    read(offset, length) {
      invariant(offset % 4 === 0 && length % 4 === 0, "codes are read by the word");
      const out = new Uint32Array(length / 4);
      for (let i = 0; i < out.length; i++) out[i] = mix(offset / 4 + i, seed);
      return new Uint8Array(out.buffer);
    },
  };
}

/** Float16 normal draws of the given standard deviation, from a table of 4096. */
function weights(name: string, shape: number[], seed: number, deviation: number): RandomTensor {
  const random = seededRandom(seed);
  return float16(name, shape, seed, () => gaussian(random) * deviation);
}

/** Float16 draws between half of `unit` and one and a half. */
function scales(name: string, shape: number[], seed: number, unit: number): RandomTensor {
  const random = seededRandom(seed);
  return float16(name, shape, seed, () => (0.5 + random()) * unit);
}

function float16(name: string, shape: number[], seed: number, draw: () => number): RandomTensor {
  const table = new Uint16Array(Float16Array.from({ length: 4096 }, draw).buffer);
  return {
    info: describe(name, "F16", shape),
    read(offset, length) {
      invariant(offset % 2 === 0 && length % 2 === 0, "float16 is read by the element");
      const out = new Uint16Array(length / 2);
      for (let i = 0; i < out.length; i++) out[i] = table[mix(offset / 2 + i, seed) >>> 20];
      return new Uint8Array(out.buffer);
    },
  };
}

/** A 32-bit hash of a place and a seed (the finalizer of MurmurHash3, by Austin Appleby). */
function mix(index: number, seed: number): number {
  let h = Math.imul(index ^ Math.imul(seed, 0x9e3779b1), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  h ^= h >>> 16;
  h = Math.imul(h, 0x27d4eb2f);
  return (h ^ (h >>> 15)) >>> 0;
}
