/**
 * How weights lie on the GPU: in row blocks, so that what one workgroup reads is contiguous, and
 * neighbouring threads read neighbouring rows of N.
 *
 * - code words: `[row block][K/v/4][m][rowBlock]` u32, four codes along K each (K/v/2 and two where
 *   codes have more than 8 bits)
 * - scales: `[row block][K/g][rowBlock]` f16
 * - dense: `[row block][K/8][rowBlock][8]` f16, K padded with zeros to a multiple of 32
 *
 * Rows past N in the last row block are zero.
 *
 * @module
 */
import { DENSE_K_ALIGN, DENSE_OCTET, roundUp } from "./order.ts";

/**
 * Copies rows of N `[from, from + rows)` of a slice of lines into tiles. A line holds one value for
 * each row of N; the row blocks that it is cut into stand `blockStride` apart in `out`, and the lines
 * of a row block `lineStride`.
 */
export function tileLines<T extends Uint32Array | Uint16Array>(
  slice: T,
  out: T,
  options: {
    /** Values in a line of the slice: N of the whole matrix. */
    total: number;
    lines: number;
    /** The first row of N and the number of rows that are wanted. */
    from: number;
    rows: number;
    rowBlock: number;
    /** Elements in `out` from one row block to the next, and from one line to the next. */
    blockStride: number;
    lineStride: number;
    /** Elements before the first line in `out`. */
    base: number;
  },
): void {
  const { total, lines, from, rows, rowBlock, blockStride, lineStride, base } = options;
  for (let line = 0; line < lines; line++) {
    for (let at = 0, block = 0; at < rows; at += rowBlock, block++) {
      const start = line * total + from + at;
      const part = slice.subarray(start, start + Math.min(rowBlock, rows - at));
      out.set(part as never, base + block * blockStride + line * lineStride);
    }
  }
}

/** K of a dense matrix as it is stored. */
export function denseStoredK(k: number): number {
  return roundUp(k, DENSE_K_ALIGN);
}

/**
 * Tiles `rows` consecutive rows of a row block (float16 bits, row-major, K each) into `out`, the row
 * block's `[K/8][rowBlock][8]`, from its row `first` on.
 */
export function tileDenseRows(
  source: Uint16Array,
  out: Uint16Array,
  options: { k: number; rows: number; first: number; rowBlock: number },
): void {
  const { k, rows, first, rowBlock } = options;
  const stride = rowBlock * DENSE_OCTET;
  for (let row = 0; row < rows; row++) {
    const from = row * k;
    let to = (first + row) * DENSE_OCTET;
    for (let at = 0; at < k; at += DENSE_OCTET, to += stride) {
      const end = Math.min(at + DENSE_OCTET, k);
      for (let i = at, o = to; i < end; i++, o++) out[o] = source[from + i];
    }
  }
}
