import { assertEquals, assertStringIncludes } from "@std/assert";
import type { Gpu } from "../gpu.ts";
import { decodeCode, decodeProgram } from "./decode.ts";
import { outlineOf } from "./decode_fixture.ts";
import type { PairFinish } from "./types.ts";
import { defaultVariant, kernelFor } from "./variant.ts";
import { type Batch, BATCHES } from "./wgsl.ts";

Deno.test("pairs are finished behind the sums where an adapter has too few bindings for both in a kernel", () => {
  const format = { m: 1, v: 4, g: 128, b: 8 };
  const matrix = outlineOf([1024], 1024, format);
  const finish: PairFinish = {
    half: 4,
    code: () => "fn finish(row: u32, n: u32, first: vec4<f32>, second: vec4<f32>) {}",
    bindings: ["read", "read", "uniform", "write", "write"],
    buffers: [],
  };
  // The kernel has five storage buffers of its own, and a uniform is none.
  for (const [maxStorageBuffersPerShaderStage, finishes] of [[8, false], [9, true]] as const) {
    const limits = {
      maxStorageBuffersPerShaderStage,
      maxComputeInvocationsPerWorkgroup: 1024,
      maxComputeWorkgroupStorageSize: 48 * 1024,
    };
    const made = decodeCode(
      {
        gpu: { limits } as Gpu,
        matrix,
        profile: { version: 0, decode: "dequantize" },
        input: { stride: matrix.k, offset: 0 },
      },
      defaultVariant(false),
      1,
      { store: "store", vector: true, finish },
    )!;
    assertEquals(made.finishes, finishes);
    assertEquals(made.code.includes("fn finish("), finishes);
    assertEquals(made.splitGroups, 1);
  }
});

Deno.test("the code that rounds rows is part of the program of kernels that take integers", () => {
  const matrix = outlineOf([1024], 1024, { m: 1, v: 4, g: 128, b: 8 });
  const limits = {
    maxComputeInvocationsPerWorkgroup: 1024,
    maxComputeWorkgroupStorageSize: 48 * 1024,
  };
  const rounding = (decode: "codegemm" | "int8", batches: Batch[]) => {
    const options = {
      gpu: { limits } as Gpu,
      matrix,
      profile: { version: 0, decode },
      input: { stride: matrix.k, offset: 0 },
    };
    const variant = { ...defaultVariant(false), batches };
    return decodeProgram(options, variant, { store: "store", vector: true }).rounding;
  };
  // By it, remembered choices of kernels are forgotten when the rounding changes.
  assertStringIncludes(rounding("int8", [1, 4])!, "fn pack_int8(");
  assertEquals(rounding("int8", [1, 2]), null);
  assertEquals(rounding("codegemm", [1, 4]), null);
});

Deno.test("rows run in the smallest batch that holds them, else in a large one that wastes least", () => {
  const batchOf = (batches: readonly Batch[], rows: number) =>
    kernelFor(batches.map((batch) => ({ batch })), rows).batch;
  const on = (batches: readonly Batch[], ...rows: number[]) =>
    rows.map((count) => batchOf(batches, count));
  assertEquals(on(BATCHES, 1, 2, 3, 5, 9, 16), [1, 2, 4, 8, 16, 16]);
  // 24 rows are three times eight, 17 to 23 as many; 25 are twice sixteen, as four times eight.
  assertEquals(on(BATCHES, 17, 24, 25, 32, 33, 40, 41), [8, 8, 16, 16, 8, 8, 16]);
  assertEquals(on([1, 2, 4], 5, 6, 7, 8), [2, 2, 4, 4]);
  assertEquals(on([1, 4], 2, 5, 64), [4, 4, 4]);
});
