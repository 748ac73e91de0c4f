/**
 * Eight-bit integers for the kernel family `int8`: how centroids and activations are rounded to them.
 *
 * A group of K is what shares a scale of activations: `q = round(x * 127 / max|x|)`, ties to even, the
 * quotient in twelve bits. All centroids of a matrix share one scale, rounded the same way when the
 * matrix is loaded. Their products are summed exactly.
 *
 * @module
 */

/** The largest magnitude. */
export const INT8_MAX = 127;
/** What a scale is of the largest magnitude: multiplied with, since a quotient may be rounded either way. */
const INT8_STEP = Math.fround(1 / INT8_MAX);

/** A scale, and `q` such that `scale * q[i]` is about `values[i]`. */
export interface Int8Values {
  q: Int8Array<ArrayBuffer>;
  /** The largest magnitude of the values. */
  most: number;
  /** float32 */
  scale: number;
}

/** Rounds finite values to integers of one scale, as kernels round activations. */
export function roundToInt8(values: ArrayLike<number>): Int8Values {
  let most = 0;
  for (let i = 0; i < values.length; i++) most = Math.max(most, Math.abs(values[i]));
  const inverse = inverseOf(most);
  const q = Int8Array.from(values, (value) => roundEven(Math.fround(value * inverse)));
  return { q, most, scale: Math.fround(most * INT8_STEP) };
}

/**
 * Added to the bits of a quotient of {@linkcode INT8_MAX} by a float16 number before its last
 * {@linkcode INVERSE_CUT_BITS} are cut off: then all quotients are 15 last places from the nearest
 * cut at least. WGSL's division may be off by two and a half.
 */
const INVERSE_OFFSET = 2248;
const INVERSE_CUT_BITS = 12;

/**
 * What values are multiplied with whose largest magnitude is a float16 number: the same on every
 * adapter.
 *
 * @param quotient of {@linkcode INT8_MAX} by `most`, about
 */
export function inverseOf(most: number, quotient = INT8_MAX / most): number {
  if (!(most > 0)) return 0;
  const words = new Uint32Array(Float32Array.of(quotient).buffer);
  words[0] = (words[0] + INVERSE_OFFSET) >>> INVERSE_CUT_BITS << INVERSE_CUT_BITS;
  return new Float32Array(words.buffer)[0];
}

/** To the nearest integer, ties to the even one, as WGSL's `round`. */
function roundEven(value: number): number {
  const low = Math.floor(value);
  const above = value - low;
  return above > 0.5 || (above === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

/**
 * WGSL of `dot_int8(a, b)`, the sum of the products of four integers of two words, of
 * `pack_int8(values)`, which rounds four to one word, of `largest_int8`, which needs `f16`, and of
 * `inverse_int8(largest)`, what values are multiplied with before they are rounded.
 *
 * @param packed whether `hasPackedDot`; the same integers either way
 */
export function int8Wgsl(packed: boolean): string {
  return LARGEST_WGSL + (packed
    ? /* wgsl */ `
fn dot_int8(a: u32, b: u32) -> i32 { return dot4I8Packed(a, b); }
fn pack_int8(values: vec4<f32>) -> u32 { return pack4xI8(vec4<i32>(round(values))); }
`
    : /* wgsl */ `
fn unpack_int8(word: u32) -> vec4<i32> {
  return (vec4<i32>(i32(word)) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u);
}
fn dot_int8(a: u32, b: u32) -> i32 { return dot(unpack_int8(a), unpack_int8(b)); }
fn pack_int8(values: vec4<f32>) -> u32 {
  let bytes = vec4<u32>(vec4<i32>(round(values))) & vec4<u32>(255u);
  return bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
}
`);
}

/**
 * `largest_int8(a, b, c, d)`: the bits of the largest magnitude, as a float32. Bits rise with the
 * number and are largest of NaN, which `max` might drop: so what is not a number makes its group's
 * scale none either, and shows in every output of its row.
 */
const LARGEST_WGSL = /* wgsl */ `
fn magnitudes(values: vec4<f16>) -> vec4<u32> {
  return bitcast<vec4<u32>>(vec4<f32>(values)) & vec4<u32>(0x7fffffffu);
}
fn largest_int8(a: vec4<f16>, b: vec4<f16>, c: vec4<f16>, d: vec4<f16>) -> u32 {
  let most = max(max(magnitudes(a), magnitudes(b)), max(magnitudes(c), magnitudes(d)));
  return max(max(most.x, most.y), max(most.z, most.w));
}
fn inverse_int8(largest: f32) -> f32 {
  let bits = bitcast<u32>(${INT8_MAX}.0 / largest) + ${INVERSE_OFFSET}u;
  let inverse = bitcast<f32>(bits >> ${INVERSE_CUT_BITS}u << ${INVERSE_CUT_BITS}u);
  return select(0.0, inverse, largest > 0.0);
}
`;

/**
 * How a kernel turns a sum of products into float32. Converting takes a slow instruction: a sum that
 * begins with the bits of 1.5 * 2^23 has them, plus itself, as a float32, while it is below 2^22.
 *
 * @param products summed at most
 */
export function int8Sum(products: number): { start: string; toFloat(sum: string): string } {
  return products * INT8_MAX ** 2 < 2 ** 22
    ? {
      start: `${0x4b400000}`,
      toFloat: (sum) => `(bitcast<f32>(${sum}) - ${1.5 * 2 ** 23}.0)`,
    }
    : { start: "0", toFloat: (sum) => `f32(${sum})` };
}

/**
 * What the largest magnitude of a group of activations is multiplied with, in one go, for the scale of
 * the group's products: rounding of two products might depend on the kernel.
 *
 * @param scale of the centroids
 */
export function int8BookScale(scale: number): number {
  return Math.fround(scale * INT8_STEP);
}

/**
 * What the kernels read of a stack's codebooks: its members' centroids, four elements a word in their
 * own order `(members, m, 256, v / 4)`, then the bits of each member's {@linkcode int8BookScale}.
 *
 * @param centroids `(members, m, 256, v)`, `v` a multiple of 4
 */
export function int8Books(centroids: Float16Array, members: number): Uint32Array<ArrayBuffer> {
  const each = centroids.length / members;
  const words = new Uint32Array(centroids.length / 4 + members);
  const scales = new Float32Array(words.buffer, centroids.length, members);
  for (let member = 0; member < members; member++) {
    const { q, scale } = roundToInt8(centroids.subarray(member * each, (member + 1) * each));
    words.set(new Uint32Array(q.buffer), member * each / 4);
    scales[member] = int8BookScale(scale);
  }
  return words;
}
