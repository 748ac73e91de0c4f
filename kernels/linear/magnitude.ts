/**
 * Keeps the kernels' float16 sums within range. They multiply centroids with activations before any
 * scale, and a quantizer's centroids are as large as it likes: with those of a root mean square of 1,
 * the largest are 5 and more, and an activation of 13,000 would end in infinity, and its row in NaN.
 *
 * So a matrix's centroids are divided as it is loaded, and its scales multiplied, by one power of two,
 * such that no weight is larger than 1 before its scale. Then no product is larger than its activation,
 * which float16 holds; and as a power of two it costs no bit, but of what is 2^-25 small beside it.
 *
 * @module
 */
import { FleetError } from "../../shared/errors.ts";

const LARGEST_FLOAT16 = 65504;

/**
 * The least exponent, 0 or more, of a power of two that is not exceeded by any sum of one centroid of
 * each codebook.
 *
 * @param books `(m, 2^b, v)`, float16 bits, all finite
 */
export function centroidExponent(books: Uint16Array<ArrayBuffer>, m: number): number {
  const values = new Float16Array(books.buffer, books.byteOffset, books.length);
  const size = values.length / m;
  let sum = 0;
  for (let book = 0; book < m; book++) {
    let largest = 0;
    for (let i = book * size; i < (book + 1) * size; i++) {
      largest = Math.max(largest, Math.abs(values[i]));
    }
    sum += largest;
  }
  return Math.max(0, Math.ceil(Math.log2(sum)));
}

/**
 * Float16 bits of `values * 2^exponent`.
 *
 * @param name of the tensor, for the error
 * @param values float16 bits
 * @throws FleetError `bad-checkpoint` where one leaves float16's range
 */
export function timesPowerOfTwo(
  name: string,
  values: Uint16Array<ArrayBuffer>,
  exponent: number,
): Uint16Array<ArrayBuffer> {
  if (exponent === 0) return values;
  const factor = 2 ** exponent;
  const out = new Uint16Array(values);
  const products = new Float16Array(out.buffer);
  for (let i = 0; i < products.length; i++) {
    const product = products[i] * factor;
    if (Math.abs(product) > LARGEST_FLOAT16) {
      throw new FleetError(
        "bad-checkpoint",
        `${name}: a scale of ${products[i]}, times the largest centroid, is beyond float16`,
      );
    }
    products[i] = product;
  }
  return out;
}
