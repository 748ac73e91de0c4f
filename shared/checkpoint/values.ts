/**
 * Looking at the values of tensors: what is not finite would poison every token after it.
 *
 * @module
 */
import { FleetError } from "../errors.ts";
import { type DType, DTYPE_BYTES } from "../model_config.ts";

const FLOAT16_EXPONENT = 0x7c00;
/** Exponent bits all ones: infinity or NaN, in the word of each float type. */
const EXPONENT: Partial<Record<DType, number>> = {
  F16: FLOAT16_EXPONENT,
  BF16: 0x7f80,
  F32: 0x7f800000,
};

/**
 * Checks that every float is a number. Integer tensors pass.
 *
 * @param name of the tensor, for the error
 * @param bytes whole elements, little-endian (a slice of a tensor is fine)
 * @param firstElement index of the slice's first element, for the error
 * @throws FleetError `bad-checkpoint` that names the tensor and the first bad element
 */
export function assertFinite(
  name: string,
  dtype: DType,
  bytes: Uint8Array,
  firstElement = 0,
): void {
  const mask = EXPONENT[dtype];
  if (mask === undefined) return;
  const words = elements(bytes, DTYPE_BYTES[dtype]);
  for (let i = 0; i < words.length; i++) {
    if ((words[i] & mask) === mask) {
      throw new FleetError(
        "bad-checkpoint",
        `${name}: element ${firstElement + i} is not a finite number; the checkpoint is damaged`,
      );
    }
  }
}

/**
 * Floats of any stored type as float32.
 *
 * @param bytes whole elements, little-endian
 * @throws FleetError `bad-checkpoint` when the type is not a float
 */
export function toFloat32(
  name: string,
  dtype: DType,
  bytes: Uint8Array,
): Float32Array<ArrayBuffer> {
  if (EXPONENT[dtype] === undefined) {
    throw new FleetError("bad-checkpoint", `${name} is ${dtype}; a float type was expected`);
  }
  const words = elements(bytes, DTYPE_BYTES[dtype]);
  const out = new Float32Array(words.length);
  if (dtype === "F16") {
    const halves = new Float16Array(words.buffer, words.byteOffset, words.length);
    // A loop: TypedArray.set() between float types is ten times slower in V8.
    for (let i = 0; i < out.length; i++) out[i] = halves[i];
  } else {
    const bits = new Uint32Array(out.buffer);
    const shift = dtype === "BF16" ? 16 : 0;
    for (let i = 0; i < bits.length; i++) bits[i] = words[i] << shift;
  }
  return out;
}

/**
 * Floats of any stored type as float16 bits, rounded to nearest.
 *
 * @param bytes whole elements, little-endian
 * @throws FleetError `bad-checkpoint` when a value is not finite or beyond float16's range
 */
export function toFloat16(
  name: string,
  dtype: DType,
  bytes: Uint8Array,
  firstElement = 0,
): Uint16Array<ArrayBuffer> {
  const bits = float16Bits(name, dtype, bytes);
  let bad = 0;
  while (bad < bits.length && (bits[bad] & FLOAT16_EXPONENT) !== FLOAT16_EXPONENT) bad++;
  if (bad === bits.length) return bits;
  assertFinite(name, dtype, bytes, firstElement);
  throw new FleetError(
    "bad-checkpoint",
    `${name}: element ${firstElement + bad} is ${toFloat32(name, dtype, bytes)[bad]}, ` +
      "beyond the range of float16 (65504)",
  );
}

/** Rounded to nearest, infinities and NaN among them, in a buffer of their own. */
function float16Bits(name: string, dtype: DType, bytes: Uint8Array): Uint16Array<ArrayBuffer> {
  switch (dtype) {
    case "F16":
      return new Uint16Array(elements(bytes, 2));
    case "BF16": {
      const words = elements(bytes, 2), table = bfloat16Table();
      const out = new Uint16Array(words.length);
      for (let i = 0; i < out.length; i++) out[i] = table[words[i]];
      return out;
    }
    default: {
      const floats = toFloat32(name, dtype, bytes);
      return new Uint16Array(new Float16Array(floats).buffer);
    }
  }
}

let bfloat16: Uint16Array | null = null;

/** Float16 bits of every bfloat16: looking a value up takes half the time of converting it. */
function bfloat16Table(): Uint16Array {
  if (bfloat16 === null) {
    const floats = new Float32Array(Uint32Array.from({ length: 65536 }, (_, i) => i << 16).buffer);
    bfloat16 = new Uint16Array(new Float16Array(floats).buffer);
  }
  return bfloat16;
}

/** A view of the elements' words; copies when the bytes are not aligned. */
function elements(bytes: Uint8Array, size: number): Uint16Array | Uint32Array {
  const aligned = bytes.byteOffset % size === 0 ? bytes : new Uint8Array(bytes);
  const count = bytes.length / size;
  return size === 2
    ? new Uint16Array(aligned.buffer, aligned.byteOffset, count)
    : new Uint32Array(aligned.buffer, aligned.byteOffset, count);
}
