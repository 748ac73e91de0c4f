import { assert, assertEquals, assertNotEquals } from "@std/assert";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import { likeOne, tuneLinear, tuningKey } from "./autotune.ts";
import { outlineOf } from "./decode_fixture.ts";
import { syntheticCodes } from "./synthetic.ts";
import type { Matrix } from "./types.ts";

const FORMAT = { m: 1, v: 4, g: 32, b: 8 };

Deno.test("tuning keeps to variants that run and give the default's bits", () =>
  withGpu(async (gpu) => {
    if (!gpu.timestamps) return;
    const matrix = await syntheticCodes(gpu, "w", [256, 256], 256, FORMAT, 1);
    const impossible = { codeThreads: -1 };
    const { variant, trials } = await tuneLinear(gpu, [matrix, matrix], "codegemm", [
      { turnK: 32 },
      impossible,
    ]);
    assertEquals(trials.map(({ choice }) => choice), [{}, { turnK: 32 }, impossible]);
    const batches = [...trials[0].microseconds.keys()];
    assertEquals([...trials[1].microseconds.keys()], batches, "another turn gives the same bits");
    assert([...trials[1].microseconds.values()].every((us) => us > 0));
    assertEquals(trials[2].microseconds.size, 0);
    for (const choice of Object.values(variant.byBatch ?? {})) {
      assertEquals(choice, { turnK: 32 });
    }
    matrix.destroy();
  }, "adapter"));

Deno.test("a batch that gives a row other bits than it has alone is not used", () => {
  const bits = (...words: number[]) => ({ bits: Uint32Array.from(words) });
  const alike = new Map([[1, bits(7, 8)], [2, bits(7, 8, 1, 2)]] as const);
  assertEquals(likeOne(alike, 2), {});
  const unlike = new Map([[1, bits(7, 8)], [2, bits(7, 9, 1, 2)], [4, bits(7, 8, 3)]] as const);
  assertEquals(likeOne(unlike, 2), { batches: [1, 4] });
});

Deno.test("a choice is forgotten when what stores whole sums changes, or what puts partial ones together", async () => {
  const limits = {
    maxComputeInvocationsPerWorkgroup: 1024,
    maxComputeWorkgroupStorageSize: 48 * 1024,
  };
  const gpu = { limits, info: { name: "a GPU", software: false } } as Gpu;
  const key = (matrix: Matrix, decode: "codegemm" | "dequantize") => tuningKey(gpu, matrix, decode);
  // Kernels of one split store sums themselves; an output of another width is stored in another way.
  const whole = outlineOf([1024], 32, FORMAT);
  const narrower = { ...whole, n: whole.n - 1 };
  assert(whole.order.kind === "code" && whole.order.dequantize.splits === 1);
  assertEquals(await key(whole, "dequantize"), await key({ ...whole }, "dequantize"));
  assertNotEquals(await key(whole, "dequantize"), await key(narrower, "dequantize"));
  // Of kernels with Psumbooks, only what puts the splits together knows of slices.
  const split = outlineOf([1024], 8192, FORMAT);
  const order = { ...split.order, slices: split.order.slices + 1 } as Matrix["order"];
  assert(order.splits > 1);
  assertNotEquals(await key(split, "codegemm"), await key({ ...split, order }, "codegemm"));
});
