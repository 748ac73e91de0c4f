import { assert, assertEquals } from "@std/assert";
import { Gpu } from "../gpu.ts";
import { tuneLinear } from "./autotune.ts";
import { syntheticCodes } from "./synthetic.ts";

const FORMAT = { m: 1, v: 4, g: 32, b: 8 };

Deno.test("tuning keeps to variants that run and give the default's bits", async () => {
  const gpu = await Gpu.open({ software: true });
  try {
    if (!gpu.timestamps) return;
    const matrix = await syntheticCodes(gpu, "w", [256, 256], 256, FORMAT, 1);
    const tooMany = { codeThreads: 4096 };
    const { variant, trials } = await tuneLinear(gpu, [matrix, matrix], "codegemm", [
      { turnK: 32 },
      tooMany,
    ]);
    assertEquals(trials.map(({ variant }) => variant), [{}, { turnK: 32 }, tooMany]);
    assert(trials[1].microseconds!.every((us) => us > 0), "another turn gives the same bits");
    assertEquals(trials[2].microseconds, null);
    assert(variant !== tooMany);
    matrix.destroy();
    gpu.check();
  } finally {
    gpu.close();
  }
});
