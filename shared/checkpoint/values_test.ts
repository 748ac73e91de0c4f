import { assertEquals, assertThrows } from "@std/assert";
import { FleetError } from "../errors.ts";
import type { DType } from "../model_config.ts";
import { floatBytes } from "./fixture.ts";
import { assertFinite, toFloat16, toFloat32 } from "./values.ts";

const FLOATS: DType[] = ["F16", "BF16", "F32"];
/** Exact in all three types. */
const VALUES = [0, -0, 1, -1.5, 0.0078125, 240, -2];

Deno.test("floats of every type become float32 and float16 without a change", () => {
  for (const dtype of FLOATS) {
    const bytes = floatBytes(Float32Array.from(VALUES), dtype);
    assertEquals([...toFloat32("t", dtype, bytes)], VALUES);
    assertEquals([...new Float16Array(toFloat16("t", dtype, bytes).buffer)], VALUES);
  }
});

Deno.test("slices that begin at odd bytes are read all the same", () => {
  for (const dtype of FLOATS) {
    const bytes = floatBytes(Float32Array.from(VALUES), dtype);
    const shifted = new Uint8Array(bytes.length + 1);
    shifted.set(bytes, 1);
    assertEquals([...toFloat32("t", dtype, shifted.subarray(1))], VALUES);
    assertEquals(
      toFloat16("t", dtype, shifted.subarray(1)),
      toFloat16("t", dtype, bytes),
    );
  }
});

Deno.test("NaN and infinities of every type are found, and the element is named", () => {
  for (const dtype of FLOATS) {
    for (const bad of [NaN, Infinity, -Infinity]) {
      const bytes = floatBytes(Float32Array.from([1, 2, bad, 4]), dtype);
      const error = assertThrows(
        () => assertFinite("model.norm.weight", dtype, bytes, 100),
        FleetError,
        "model.norm.weight: element 102",
      );
      assertEquals(error.code, "bad-checkpoint");
      assertThrows(() => toFloat16("t", dtype, bytes), FleetError, "element 2");
    }
    assertFinite("t", dtype, floatBytes(Float32Array.from(VALUES), dtype));
  }
  assertFinite("codes", "I32", new Uint8Array(8).fill(0xff));
});

Deno.test("rounding to float16 is to nearest, ties to even; what does not fit is refused", () => {
  const bytes = floatBytes(Float32Array.from([1 / 3, 2049, 2051, 65519, 1e-8, 6e-8]), "F32");
  assertEquals(
    [...new Float16Array(toFloat16("t", "F32", bytes).buffer)],
    [0.333251953125, 2048, 2052, 65504, 0, 5.960464477539063e-8],
  );
  const large = floatBytes(Float32Array.from([1, 65520]), "F32");
  assertThrows(() => toFloat16("lm_head.weight", "F32", large), FleetError, "element 1 is 65520");
  assertThrows(() => toFloat32("codes", "I32", new Uint8Array(4)), FleetError, "codes is I32");
});
