import { assertAlmostEquals, assertEquals } from "@std/assert";
import { ropeAngles, ropeFrequencies } from "./rope_angles.ts";

Deno.test("plain frequencies fall geometrically from 1", () => {
  const frequencies = ropeFrequencies({ headDim: 8, theta: 10_000, scaling: null });
  assertEquals(frequencies.length, 4);
  [1, 0.1, 0.01, 0.001].forEach((expected, i) => assertAlmostEquals(frequencies[i], expected));
});

Deno.test("llama3 scaling keeps short wavelengths, slows long ones and blends between", () => {
  const options = { headDim: 128, theta: 500_000 };
  const plain = ropeFrequencies({ ...options, scaling: null });
  const scaled = ropeFrequencies({
    ...options,
    scaling: { factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalContextTokens: 8192 },
  });
  const ratios = Array.from(scaled, (frequency, i) => plain[i] / frequency);
  const wavelength = (i: number) => 2 * Math.PI / plain[i];
  let blended = 0;
  for (let i = 0; i < 64; i++) {
    if (wavelength(i) < 8192 / 4) assertEquals(ratios[i], 1);
    else if (wavelength(i) > 8192) assertAlmostEquals(ratios[i], 8, 1e-12);
    else {
      blended++;
      const share = (8192 / wavelength(i) - 1) / 3;
      assertAlmostEquals(1 / ratios[i], (1 - share) / 8 + share, 1e-12);
    }
  }
  assertEquals(blended, 6);
});

Deno.test("the table holds cosine and sine of position times frequency", () => {
  const table = ropeAngles({ headDim: 8, theta: 10_000, scaling: null }, 3);
  assertEquals(table.length, 3 * 4 * 2);
  assertAlmostEquals(table[(2 * 4 + 1) * 2], Math.cos(0.2), 1e-6);
  assertAlmostEquals(table[(2 * 4 + 1) * 2 + 1], Math.sin(0.2), 1e-6);
});
