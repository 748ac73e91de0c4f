import { assertEquals, assertGreater, assertMatch, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { Gpu } from "./gpu.ts";
import { sampleReference } from "./sampling/reference.ts";
import { selfTest } from "./self_test.ts";
import { SAMPLING_REQUESTS, samplingLogits } from "./self_test/sampling_check.ts";

Deno.test("selfTest() passes every kernel and gives the same digest again and on default limits", async () => {
  const digests = [];
  for (const limits of ["adapter", "adapter", "default"] as const) {
    const gpu = await Gpu.open({ software: true, limits });
    const { digest } = await selfTest(gpu);
    assertMatch(digest, /^[0-9a-f]{64}$/);
    digests.push(digest);
    gpu.close();
  }
  assertEquals(new Set(digests).size, 1);
});

Deno.test("selfTest() names the kernel that is wrong, and by how much, NaN included", async () => {
  const gpu = await Gpu.open({ software: true });
  for (const [value, message] of [[1.5, "swirl differs from its reference by 0.5"], [NaN, "NaN"]]) {
    await assertRejects(
      () =>
        selfTest(gpu, [() =>
          Promise.resolve([{
            kernel: "swirl",
            actual: [1, value as number],
            expected: [1, 1],
            tolerance: () => 0.1,
            raw: new ArrayBuffer(4),
          }])]),
      FleetError,
      message as string,
    );
  }
  gpu.close();
});

Deno.test("the draws of the self-test are not decided by rounding on any adapter", () => {
  const rows = samplingLogits();
  SAMPLING_REQUESTS.forEach((request, i) => {
    const { margin, boundary } = sampleReference(rows[i], request, i);
    assertGreater(margin, 0.05);
    assertGreater(boundary, 1e-5);
  });
});
