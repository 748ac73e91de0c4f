import { assert, assertEquals, assertThrows } from "@std/assert";
import { parseFormatName } from "../../shared/checkpoint/mod.ts";
import { FleetError } from "../../shared/errors.ts";
import type { TensorSource } from "../../shared/model_config.ts";
import { withGpu } from "../gpu_fixture.ts";
import { centroidExponent, timesPowerOfTwo } from "./magnitude.ts";
import { loadMatrix } from "./matrix.ts";
import { randomTensors } from "./random_tensors.ts";
import { bitsOf, randomActivations, runLinear, stepShape } from "./rig.ts";
import type { MatrixShape } from "./types.ts";

const bits = (...values: number[]) =>
  bitsOf(Float16Array.from(values) as Float16Array<ArrayBuffer>);

Deno.test("the exponent is that of the largest weight that codebooks can make, and never raises them", () => {
  assertEquals(centroidExponent(bits(0.5, -0.25), 1), 0);
  assertEquals(centroidExponent(bits(1, -1), 1), 0);
  assertEquals(centroidExponent(bits(1, -5.3), 1), 3);
  assertEquals(centroidExponent(bits(1, -3, 2, 5), 2), 3);
  assertEquals(centroidExponent(bits(0, 0), 1), 0);
  assertEquals(centroidExponent(bits(65504), 1), 16);
});

Deno.test("a power of two changes no bit but the exponent's, and refuses what float16 cannot hold", () => {
  assertEquals(timesPowerOfTwo("s", bits(0.1, -3, 0, 6e-8), 3), bits(0.8, -24, 0, 4.8e-7));
  assertEquals(timesPowerOfTwo("s", bits(5.3, -0.7), -3), bits(5.3 / 8, -0.7 / 8));
  const values = bits(0.1, 9000);
  assertThrows(() => timesPowerOfTwo("w.scales", values, 3), FleetError, "w.scales");
  assertEquals(values, bits(0.1, 9000));
});

/** Tensors whose centroids are multiplied by `factor`, and their scales divided. */
function withCentroids(tensors: TensorSource, factor: number): TensorSource {
  return {
    ...tensors,
    async read(name, offset, length) {
      const bytes = await tensors.read(name, offset, length);
      const by = name.endsWith("codebooks") ? factor : name.endsWith("scales") ? 1 / factor : null;
      if (by === null) return bytes;
      const values = new Float16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
      return new Uint8Array(values.map((value) => value * by).buffer);
    },
  };
}

Deno.test("an activation of 60,000 meets no infinity, whatever the magnitude of the centroids", () =>
  withGpu(async (gpu) => {
    const shape: MatrixShape = [40, 256];
    for (const text of ["m1v4g128", "m2v8g64"]) {
      const format = parseFormatName(text)!;
      const tensors = randomTensors("w", shape, format, 3);
      for (const profile of ["codegemm", "dequantize"] as const) {
        const outputs: Float32Array[] = [];
        for (const factor of [1 / 16, 1, 16]) {
          const matrix = await loadMatrix(gpu, withCentroids(tensors, factor), "w", shape, format);
          const x = randomActivations(2 * shape[1], 5);
          for (const row of [0, 1]) x[row * shape[1] + 77] = 60_000;
          const y = await runLinear(gpu, {
            matrix,
            x: bitsOf(x),
            shape: stepShape(1, 1),
            ranges: ["decode", "prefill"],
            profile,
          });
          assert(y.every(Number.isFinite), `${text} ${profile}, centroids times ${factor}`);
          outputs.push(y);
          matrix.destroy();
        }
        const largest = Math.max(...outputs[1].map(Math.abs));
        for (const y of outputs) {
          y.forEach((value, i) => assert(Math.abs(value - outputs[1][i]) < 1e-3 * largest));
        }
      }
    }
  }, "adapter"));
