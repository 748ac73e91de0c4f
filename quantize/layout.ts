/**
 * Between arrays in the making and the published layout of a CodeGEMM matrix.
 *
 * @module
 */
import type { CodeGemmFormat } from "../shared/model_config.ts";
import type { CodedArrays } from "./gpu/coded_matrix.ts";
import type { QuantizedMatrix } from "./matrix.ts";

/** The three tensors of a matrix in the published layout. */
export type StoredCodes = Pick<QuantizedMatrix, "codes" | "codebooks" | "scales">;

/** To the published layout; codebooks and scales are rounded to float16. */
export function toStored(
  { codes, codebooks, scales }: CodedArrays,
  { m, v, g }: CodeGemmFormat,
  [n, k]: readonly [n: number, k: number],
): StoredCodes {
  const positions = k / v, groups = k / g;
  const words = new Uint32Array(m * positions / 4 * n);
  for (let row = 0; row < n; row++) {
    for (let i = 0; i < positions; i++) {
      for (let j = 0; j < m; j++) {
        const code = codes[(row * positions + i) * m + j];
        words[(j * positions / 4 + (i >> 2)) * n + row] |= code << (8 * (i & 3));
      }
    }
  }
  const turned = new Float16Array(scales.length);
  for (let row = 0; row < n; row++) {
    for (let group = 0; group < groups; group++) {
      turned[group * n + row] = scales[row * groups + group];
    }
  }
  const rounded = new Float16Array(codebooks.length);
  for (let i = 0; i < codebooks.length; i++) rounded[i] = codebooks[i];
  return {
    codes: words,
    codebooks: new Uint16Array(rounded.buffer),
    scales: new Uint16Array(turned.buffer),
  };
}

/** From the published layout. */
export function fromStored(
  { codes, codebooks, scales }: StoredCodes,
  { m, v, g }: CodeGemmFormat,
  [n, k]: readonly [n: number, k: number],
): CodedArrays {
  const positions = k / v, groups = k / g;
  const single = new Uint32Array(n * positions * m);
  for (let row = 0; row < n; row++) {
    for (let i = 0; i < positions; i++) {
      for (let j = 0; j < m; j++) {
        const word = codes[(j * positions / 4 + (i >> 2)) * n + row];
        single[(row * positions + i) * m + j] = (word >>> (8 * (i & 3))) & 0xff;
      }
    }
  }
  const halves = (bits: Uint16Array<ArrayBuffer>) =>
    new Float16Array(bits.buffer, bits.byteOffset, bits.length);
  const storedScales = halves(scales);
  return {
    codes: single,
    codebooks: Float32Array.from(halves(codebooks)),
    scales: Float32Array.from(
      { length: n * groups },
      (_, i) => storedScales[(i % groups) * n + Math.floor(i / groups)],
    ),
  };
}
