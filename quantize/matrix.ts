/**
 * One matrix, from float weights to the published CodeGEMM layout and back.
 *
 * @module
 */
import { checkFormat, toFloat32 } from "../shared/checkpoint/mod.ts";
import { invariant } from "../shared/errors.ts";
import type { CodeGemmFormat, DType, TensorInfo } from "../shared/model_config.ts";
import { type Random, randomInt } from "../shared/random.ts";
import { type CodebookSettings, decodeGroups, encodeGroups, trainCodebooks } from "./codebooks.ts";

/** A float matrix as it is stored. */
export interface StoredMatrix {
  name: string;
  dtype: DType;
  /** `[N, K]`. */
  shape: [n: number, k: number];
  /** All of it, row by row; values are finite. */
  bytes: Uint8Array;
}

/** A matrix in the published layout. */
export interface QuantizedMatrix {
  /** `(m, K/v/4, N)`: four consecutive codes along K in a word, lowest byte first. */
  codes: Uint32Array<ArrayBuffer>;
  /** Float16 bits, `(m, 2^b, v)`. */
  codebooks: Uint16Array<ArrayBuffer>;
  /** Float16 bits, `(K/g, N)`. */
  scales: Uint16Array<ArrayBuffer>;
  /** `|W - Q| / |W|`, Frobenius norms. */
  relativeError: number;
}

/** How much of a matrix the codebooks are trained on, and how. */
export interface MatrixSettings extends CodebookSettings {
  /** Vectors of v weights; a smaller matrix is taken whole. */
  sampleVectors: number;
}

/** Weights that are encoded at once: bounds the memory beside the stored matrix. */
const BLOCK_WEIGHTS = 2 ** 22;

/**
 * Quantizes a matrix: trains its codebooks on a sample of its groups, then encodes it block by block.
 *
 * @throws FleetError `bad-checkpoint` when the shape does not suit the format
 */
export function quantizeMatrix(
  matrix: StoredMatrix,
  format: CodeGemmFormat,
  settings: MatrixSettings,
  random: Random,
): QuantizedMatrix {
  const { m, v, g } = format;
  const [n, k] = matrix.shape;
  checkFormat(format, matrix.name, matrix.shape);
  const books = trainCodebooks(
    sampleGroups(matrix, g, Math.ceil(settings.sampleVectors * v / g), random),
    format,
    settings,
    random,
  );
  const codes = new Uint32Array(m * k / v / 4 * n);
  const scales = new Float16Array(k / g * n);
  let squaredError = 0, squaredNorm = 0;
  const blockRows = Math.max(1, Math.floor(BLOCK_WEIGHTS / k));
  for (let row = 0; row < n; row += blockRows) {
    const weights = weightsOf(matrix, row * k, Math.min(blockRows, n - row) * k);
    const encoded = encodeGroups(weights, books, format);
    const decoded = decodeGroups(encoded, books, format);
    for (let i = 0; i < weights.length; i++) {
      squaredError += (weights[i] - decoded[i]) ** 2;
      squaredNorm += weights[i] ** 2;
    }
    packRows(encoded.codes, codes, format, matrix.shape, row);
    for (let group = 0; group < encoded.scales.length; group++) {
      const inRow = group % (k / g), rowOf = row + Math.floor(group / (k / g));
      scales[inRow * n + rowOf] = encoded.scales[group];
    }
  }
  return {
    codes,
    codebooks: new Uint16Array(Float16Array.from(books).buffer),
    scales: new Uint16Array(scales.buffer),
    relativeError: squaredNorm === 0 ? 0 : Math.sqrt(squaredError / squaredNorm),
  };
}

/** The tensors of a quantized matrix with their bytes, as they are stored. */
export function matrixBytes(quantized: QuantizedMatrix, tensor: TensorInfo["name"]): Uint8Array {
  const kind = tensor.slice(tensor.lastIndexOf(".") + 1);
  invariant(kind === "codes" || kind === "codebooks" || kind === "scales", `a tensor of ours`);
  return new Uint8Array(quantized[kind].buffer);
}

/**
 * The weights that a quantized matrix stands for, read from the published layout by its definition:
 * `W[n, i v + d] = scale[i v / g, n] * sum_j codebook[j, code[j, i, n], d]`.
 *
 * @returns `(N, K)`
 */
export function reconstruct(
  { codes, codebooks, scales }: Pick<QuantizedMatrix, "codes" | "codebooks" | "scales">,
  { m, v, g, b }: CodeGemmFormat,
  [n, k]: [n: number, k: number],
): Float32Array<ArrayBuffer> {
  const centroids = new Float16Array(codebooks.buffer, codebooks.byteOffset, codebooks.length);
  const groupScales = new Float16Array(scales.buffer, scales.byteOffset, scales.length);
  const positions = k / v;
  const out = new Float32Array(n * k);
  for (let row = 0; row < n; row++) {
    for (let i = 0; i < positions; i++) {
      const scale = groupScales[Math.floor(i * v / g) * n + row];
      for (let d = 0; d < v; d++) {
        let sum = 0;
        for (let j = 0; j < m; j++) {
          const word = codes[(j * positions / 4 + (i >> 2)) * n + row];
          const code = (word >>> (8 * (i & 3))) & 0xff;
          sum += centroids[((j << b) + code) * v + d];
        }
        out[row * k + i * v + d] = scale * sum;
      }
    }
  }
  return out;
}

/** Puts the codes of rows `[row, row + ...)`, vector by vector, into their words. */
function packRows(
  codes: Uint8Array,
  words: Uint32Array,
  { m, v }: CodeGemmFormat,
  [n, k]: [n: number, k: number],
  row: number,
): void {
  const positions = k / v;
  for (let at = 0; at < codes.length; at++) {
    const j = at % m, vector = Math.floor(at / m);
    const i = vector % positions, rowOf = row + Math.floor(vector / positions);
    words[(j * positions / 4 + (i >> 2)) * n + rowOf] |= codes[at] << (8 * (i & 3));
  }
}

/** Weights `[first, first + count)` of a matrix. */
function weightsOf(matrix: StoredMatrix, first: number, count: number): Float32Array {
  const size = matrix.bytes.length / (matrix.shape[0] * matrix.shape[1]);
  const slice = matrix.bytes.subarray(first * size, (first + count) * size);
  return toFloat32(matrix.name, matrix.dtype, slice);
}

/** Whole groups, drawn without order but with repetition; the whole matrix when it has no more. */
function sampleGroups(
  matrix: StoredMatrix,
  g: number,
  count: number,
  random: Random,
): Float32Array {
  const groups = matrix.shape[0] * matrix.shape[1] / g;
  if (groups <= count) return weightsOf(matrix, 0, groups * g);
  const out = new Float32Array(count * g);
  for (let i = 0; i < count; i++) {
    out.set(weightsOf(matrix, randomInt(random, groups) * g, g), i * g);
  }
  return out;
}
