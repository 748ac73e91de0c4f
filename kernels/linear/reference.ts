/**
 * Plain loops that say what the linear kernels compute: weights as numbers, the exact product in
 * float64, and each kernel's own order of operations in emulated precision.
 *
 * @module
 */
import {
  type CodeGemmFormat,
  codesPerWord,
  matrixFormat,
  type TensorSource,
} from "../../shared/model_config.ts";
import { int8BookScale, roundToInt8 } from "./int8.ts";
import type { CodeOrder, DenseOrder, SplitOrder } from "./order.ts";
import { familyOrder, FLOAT16_PAIR_K } from "./order.ts";
import type { MatrixShape } from "./types.ts";

/** A CodeGEMM matrix in the published layout, as numbers. */
export interface CodeTensors {
  shape: MatrixShape;
  format: CodeGemmFormat;
  /** `(m, K/v/4, N)`, four codes a word; `(m, K/v/2, N)` and two above 8 bits */
  codes: Uint32Array;
  /** `(m, 2^b, v)` */
  codebooks: ArrayLike<number>;
  /** `(K/g, N)` */
  scales: Float16Array;
}

/** Reads a CodeGEMM matrix whole. */
export async function readCodeTensors(
  tensors: TensorSource,
  name: string,
  shape: MatrixShape,
  format: CodeGemmFormat,
): Promise<CodeTensors> {
  const read = async (tensor: string) =>
    (await tensors.read(tensor, 0, tensors.info(tensor).bytes)).slice().buffer;
  return {
    shape,
    format: matrixFormat(format, shape[1]),
    codes: new Uint32Array(await read(`${name}.codes`)),
    codebooks: new Float16Array(await read(`${name}.codebooks`)),
    scales: new Float16Array(await read(`${name}.scales`)),
  };
}

/** The code of codebook `c` at vector position `i` of row `n`. */
function codeAt({ codes, shape, format }: CodeTensors, c: number, i: number, n: number): number {
  const perWord = codesPerWord(format);
  const line = c * (shape[1] / format.v / perWord) + Math.floor(i / perWord);
  const word = codes[line * shape[0] + n];
  return (word >>> (32 / perWord * (i % perWord))) & (2 ** format.b - 1);
}

/** `W[n, iv + e] = scale[n, iv/g] * sum_c codebook[c, code[c, i, n], e]`, row-major `(N, K)`. */
export function dequantize(matrix: CodeTensors): Float64Array {
  const { shape: [n, k], format: { m, v, g, b }, codebooks, scales } = matrix;
  const out = new Float64Array(n * k);
  for (let row = 0; row < n; row++) {
    for (let i = 0; i < k / v; i++) {
      const scale = scales[Math.floor(i * v / g) * n + row];
      for (let c = 0; c < m; c++) {
        const centroid = (c * 2 ** b + codeAt(matrix, c, i, row)) * v;
        for (let e = 0; e < v; e++) out[row * k + i * v + e] += scale * codebooks[centroid + e];
      }
    }
  }
  return out;
}

/** The product of one row in float64, and beside it the sum of magnitudes that errors scale with. */
export function exactProduct(
  weights: ArrayLike<number>,
  [n, k]: MatrixShape,
  x: ArrayLike<number>,
): { y: Float64Array; magnitude: Float64Array } {
  const y = new Float64Array(n);
  const magnitude = new Float64Array(n);
  for (let row = 0; row < n; row++) {
    for (let at = 0; at < k; at++) {
      const product = weights[row * k + at] * x[at];
      y[row] += product;
      magnitude[row] += Math.abs(product);
    }
  }
  return { y, magnitude };
}

const f32 = Math.fround;
const f16 = Math.f16round;
/** Float64 holds a product of float32 values exactly, so this rounds (all but) once. */
const fma32 = (a: number, b: number, c: number) => f32(a * b + c);
const fma16 = (a: number, b: number, c: number) => f16(a * b + c);

/** The order of the `codegemm` decode kernel. */
export function codegemmProduct(
  matrix: CodeTensors,
  order: CodeOrder,
  x: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const { shape: [n, k], format: { m, v }, codebooks } = matrix;
  const positions = k / v;
  // psumbook[(i * m + c) * 256 + code]
  const psumbook = new Float16Array(positions * m * 256);
  for (let i = 0; i < positions; i++) {
    for (let c = 0; c < m; c++) {
      for (let code = 0; code < 256; code++) {
        let sum = 0;
        let pair = [0, 0];
        for (let e = 0; e < v; e++) {
          if (e > 0 && e % 16 === 0) {
            sum = f32(sum + f16(pair[0] + pair[1]));
            pair = [0, 0];
          }
          const weight = codebooks[(c * 256 + code) * v + e];
          pair[e % 2] = fma16(x[i * v + e], weight, pair[e % 2]);
        }
        psumbook[(i * m + c) * 256 + code] = f32(sum + f16(pair[0] + pair[1]));
      }
    }
  }
  return sumGroups(matrix, order, n, (row, from) => {
    let sum = 0;
    for (let i = from; i < from + order.groupPositions; i++) {
      for (let c = 0; c < m; c++) {
        sum = f16(sum + psumbook[(i * m + c) * 256 + codeAt(matrix, c, i, row)]);
      }
    }
    return [{ sum }];
  });
}

/** The order of the `dequantize` decode kernel. */
export function dequantizeProduct(
  matrix: CodeTensors,
  order: CodeOrder,
  x: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const { shape: [n], format: { m, v, b }, codebooks } = matrix;
  return sumGroups(matrix, { ...order, ...order.dequantize }, n, (row, from) => {
    const sums: { sum: number }[] = [];
    let pair = [0, 0];
    for (let i = from; i < from + order.dequantize.groupPositions; i++) {
      for (let e = 0; e < v; e++) {
        if (e > 0 && e % FLOAT16_PAIR_K === 0) {
          sums.push({ sum: f32(pair[0] + pair[1]) });
          pair = [0, 0];
        }
        let weight = 0;
        for (let c = 0; c < m; c++) {
          weight = f16(weight + codebooks[(c * 2 ** b + codeAt(matrix, c, i, row)) * v + e]);
        }
        const chain = ((i - from) * v + e) % 2;
        pair[chain] = fma16(x[i * v + e], weight, pair[chain]);
      }
    }
    return [...sums, { sum: f32(pair[0] + pair[1]) }];
  });
}

/** The order of the `int8` decode kernel. */
export function int8Product(
  matrix: CodeTensors,
  order: CodeOrder,
  x: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const int8Order = familyOrder(order, "int8");
  const group = int8Groups(matrix, int8Order.groupPositions, x);
  return sumGroups(
    matrix,
    { ...order, ...int8Order },
    matrix.shape[0],
    (row, from) => [group(row, from)],
  );
}

/** The sums of a row's groups in integers, and their scales without the weights', by first position. */
function int8Groups(
  matrix: CodeTensors,
  groupPositions: number,
  x: ArrayLike<number>,
): (row: number, from: number) => { sum: number; scale: number } {
  const { format: { m, v }, codebooks } = matrix;
  const centroids = roundToInt8(codebooks);
  const values = Array.from(x);
  return (row, from) => {
    const group = roundToInt8(values.slice(from * v, (from + groupPositions) * v));
    let sum = 0;
    for (let i = 0; i < groupPositions; i++) {
      for (let c = 0; c < m; c++) {
        const centroid = (c * 256 + codeAt(matrix, c, from + i, row)) * v;
        for (let e = 0; e < v; e++) sum += group.q[i * v + e] * centroids.q[centroid + e];
      }
    }
    return { sum, scale: f32(group.most * int8BookScale(centroids.scale)) };
  };
}

/** Scales the sums of groups and adds them in float32 as the order says. */
function sumGroups(
  { shape, scales }: CodeTensors,
  order: CodeOrder,
  n: number,
  group: (row: number, from: number) => { sum: number; scale?: number }[],
): Float32Array<ArrayBuffer> {
  const y = new Float32Array(n);
  for (let row = 0; row < n; row++) {
    y[row] = sumSplits(order, (unit, sum) => {
      for (let at = 0; at < order.unitPositions; at += order.groupPositions) {
        const from = unit * order.unitPositions + at;
        const scale = scales[Math.floor(from / order.scalePositions) * shape[0] + row];
        for (const { sum: part, scale: own = 1 } of group(row, from)) {
          sum = fma32(f32(scale * own), part, sum);
        }
      }
      return sum;
    });
  }
  return y;
}

/** The order of the dense decode kernel. */
export function denseProduct(
  weights: ArrayLike<number>,
  [n, k]: MatrixShape,
  order: DenseOrder,
  tileK: number,
  x: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const y = new Float32Array(n);
  for (let row = 0; row < n; row++) {
    y[row] = sumSplits(order, (unit, sum) => {
      for (let at = unit * tileK; at < Math.min(k, (unit + 1) * tileK); at++) {
        sum = fma32(weights[row * k + at], x[at], sum);
      }
      return sum;
    });
  }
  return y;
}

/** Units of a split one after the other, splits of a slice, slices. */
function sumSplits(order: SplitOrder, addUnit: (unit: number, sum: number) => number): number {
  const perSlice = Math.ceil(order.splits / order.slices);
  let total = 0;
  for (let slice = 0; slice < order.slices; slice++) {
    let sliceSum = 0;
    const lastSplit = Math.min((slice + 1) * perSlice, order.splits);
    for (let split = slice * perSlice; split < lastSplit; split++) {
      let sum = 0;
      const lastUnit = Math.min((split + 1) * order.splitUnits, order.units);
      for (let unit = split * order.splitUnits; unit < lastUnit; unit++) sum = addUnit(unit, sum);
      sliceSum = f32(sliceSum + sum);
    }
    total = f32(total + sliceSum);
  }
  return total;
}

/** The order of the dense prefill kernels: one chain by rising K. */
export function densePrefillProduct(
  weights: ArrayLike<number>,
  [n, k]: MatrixShape,
  x: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const y = new Float32Array(n);
  for (let row = 0; row < n; row++) {
    let sum = 0;
    for (let at = 0; at < k; at++) sum = fma32(weights[row * k + at], x[at], sum);
    y[row] = sum;
  }
  return y;
}

/**
 * The order of the CodeGEMM prefill kernels: in groups of `groupK`, a float16 chain over the even and
 * one over the odd of up to 16 K, their sum scaled and added in float32 by rising K; such sums over
 * `splitK` each are then added one after the other.
 */
export function codePrefillProduct(
  matrix: CodeTensors,
  { groupK, splitK }: { groupK: number; splitK: number },
  x: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const { shape: [n, k], format: { m, v, g, b }, codebooks, scales } = matrix;
  const y = new Float32Array(n);
  for (let row = 0; row < n; row++) {
    let sum = 0;
    for (let at = 0, end = 0; at < k; at = end) {
      if (at > 0 && at % splitK === 0) {
        y[row] = f32(y[row] + sum);
        sum = 0;
      }
      const groupEnd = at - at % groupK + groupK;
      end = Math.min(at + 16, groupEnd);
      const chains = [0, 0];
      for (let i = at; i < end; i++) {
        let weight = 0;
        for (let c = 0; c < m; c++) {
          const code = codeAt(matrix, c, Math.floor(i / v), row);
          weight = f16(weight + codebooks[(c * 2 ** b + code) * v + i % v]);
        }
        chains[(i - at) % 2] = fma16(x[i], weight, chains[(i - at) % 2]);
      }
      const scale = scales[Math.floor(at / g) * n + row];
      sum = fma32(scale, f16(chains[0] + chains[1]), sum);
    }
    y[row] = f32(y[row] + sum);
  }
  return y;
}

/**
 * The order of the prefill kernels of the `int8` family: groups of `groupK` by rising K; such sums over
 * `splitK` each are then added one after the other.
 */
export function int8PrefillProduct(
  matrix: CodeTensors,
  { groupK, splitK }: { groupK: number; splitK: number },
  x: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const { shape: [n, k], format: { v, g }, scales } = matrix;
  const group = int8Groups(matrix, groupK / v, x);
  const y = new Float32Array(n);
  for (let row = 0; row < n; row++) {
    for (let start = 0; start < k; start += splitK) {
      let split = 0;
      for (let at = start; at < Math.min(k, start + splitK); at += groupK) {
        const { sum, scale } = group(row, at / v);
        split = fma32(f32(scales[Math.floor(at / g) * n + row] * scale), sum, split);
      }
      y[row] = f32(y[row] + split);
    }
  }
  return y;
}
