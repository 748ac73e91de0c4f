import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import { calibrate } from "./calibration.ts";
import { Gpu } from "./gpu.ts";

Deno.test("calibrate() gives rates and an overhead that a computer can have", async () => {
  const gpu = await Gpu.open({ software: true });
  const { overheadMsPerLayer, ...rates } = await calibrate(gpu);
  assertEquals(Object.keys(rates).length, 3);
  for (const rate of Object.values(rates)) {
    assertGreater(rate, 1e3, "a megabyte a second");
    assertLess(rate, 1e11, "a hundred terabytes a second");
  }
  assertGreater(overheadMsPerLayer, 0);
  assertLess(overheadMsPerLayer, 1e3);
  assert(gpu.failure === null);
  gpu.close();
});
