/**
 * Tensor bytes as float16, refusing what float16 cannot hold.
 *
 * @module
 */
import { FleetError } from "../../shared/errors.ts";
import type { DType } from "../../shared/model_config.ts";

const EXPONENT = 0x7c00;

/**
 * Float16 bits of little-endian tensor bytes. For F16 the result shares the bytes where it can.
 *
 * @throws FleetError `bad-checkpoint` naming the tensor when a value is NaN, infinite, or out of
 * float16's range
 */
export function toFloat16(
  bytes: Uint8Array<ArrayBuffer>,
  dtype: DType,
  name: string,
): Uint16Array<ArrayBuffer> {
  switch (dtype) {
    case "F16":
      return checked(view(bytes, Uint16Array), name);
    case "BF16": {
      const source = view(bytes, Uint16Array);
      const table = bfloat16Table();
      const out = new Uint16Array(source.length);
      for (let i = 0; i < out.length; i++) out[i] = table[source[i]];
      return checked(out, name);
    }
    case "F32":
      return checked(new Uint16Array(new Float16Array(view(bytes, Float32Array)).buffer), name);
    default:
      throw new FleetError("bad-checkpoint", `Tensor ${name} has type ${dtype}, not a float`);
  }
}

function checked(bits: Uint16Array<ArrayBuffer>, name: string): Uint16Array<ArrayBuffer> {
  for (let i = 0; i < bits.length; i++) {
    if ((bits[i] & EXPONENT) === EXPONENT) {
      throw new FleetError(
        "bad-checkpoint",
        `Tensor ${name} holds a value that is not finite in float16 (NaN, infinite or above 65504)`,
      );
    }
  }
  return bits;
}

let bfloat16: Uint16Array<ArrayBuffer> | null = null;

/** Float16 bits of every bfloat16. */
function bfloat16Table(): Uint16Array<ArrayBuffer> {
  if (bfloat16 === null) {
    const floats = new Float32Array(Uint32Array.from({ length: 65536 }, (_, i) => i << 16).buffer);
    bfloat16 = new Uint16Array(new Float16Array(floats).buffer);
  }
  return bfloat16;
}

interface ViewClass<T> {
  new (buffer: ArrayBuffer, offset: number, length: number): T;
  readonly BYTES_PER_ELEMENT: number;
}

function view<T>(bytes: Uint8Array<ArrayBuffer>, type: ViewClass<T>): T {
  const size = type.BYTES_PER_ELEMENT;
  const aligned = bytes.byteOffset % size === 0 ? bytes : bytes.slice();
  return new type(aligned.buffer, aligned.byteOffset, aligned.byteLength / size);
}
