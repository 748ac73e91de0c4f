import { assertLess } from "@std/assert";
import { Gpu } from "../../kernels/gpu.ts";
import { gaussian, randomInt, seededRandom } from "../../shared/random.ts";
import { matmul } from "./matmul.ts";
import { Recorder } from "./operation.ts";

Deno.test("products of random shapes, transposed or not, batched, split and added, agree with plain loops", async () => {
  const random = seededRandom(11);
  const quad = (most: number) => 4 * (1 + randomInt(random, most / 4));
  const normal = (count: number) => Float32Array.from({ length: count }, () => gaussian(random));
  const gpu = await Gpu.open({ software: true, limits: "default" });
  const recorder = new Recorder(gpu);
  try {
    for (let turn = 0; turn < 12; turn++) {
      const transposeA = (turn & 1) === 1, transposeB = (turn & 2) === 2;
      // The last ones have few tiles and a long K, and are split.
      const split = turn >= 8, batch = split ? 1 : 1 + randomInt(random, 3);
      const m = quad(split ? 20 : 150),
        n = quad(split ? 20 : 150),
        k = quad(40) + (split ? 1500 : 0);
      const gap = 4 * randomInt(random, 3), offset = 4 * randomInt(random, 3);
      const [rowsA, strideA] = transposeA ? [k, m + gap] : [m, k + gap];
      const [rowsB, strideB] = transposeB ? [n, k + gap] : [k, n + gap];
      const a = normal(offset + batch * rowsA * strideA), b = normal(batch * rowsB * strideB);
      const before = normal(batch * m * n), addend = normal(batch * m * n);
      const add = turn % 3 === 0 ? undefined : turn % 3 === 1 ? "c" as const : addend;
      const c = recorder.upload("c", before);
      recorder.run(
        await matmul(recorder, {
          label: "product",
          a: {
            buffer: recorder.upload("a", a),
            stride: strideA,
            offset,
            batchStride: rowsA * strideA,
          },
          transposeA,
          b: { buffer: recorder.upload("b", b), stride: strideB, batchStride: rowsB * strideB },
          transposeB,
          c: { buffer: c, stride: n, batchStride: m * n },
          m,
          n,
          k,
          batch,
          scale: 0.5,
          add: add === addend ? recorder.upload("addend", addend) : add as "c" | undefined,
        }),
      );
      const actual = await recorder.floats(c, batch * m * n);
      let error = 0, norm = 0;
      for (let at = 0; at < actual.length; at++) {
        const i = Math.floor(at / n) % m, j = at % n, of = Math.floor(at / n / m);
        let sum = 0;
        for (let l = 0; l < k; l++) {
          const left =
            a[offset + of * rowsA * strideA + (transposeA ? l * strideA + i : i * strideA + l)];
          sum += left * b[of * rowsB * strideB + (transposeB ? j * strideB + l : l * strideB + j)];
        }
        const expected = sum / 2 + (add === undefined ? 0 : add === "c" ? before[at] : addend[at]);
        error += (actual[at] - expected) ** 2;
        norm += expected ** 2;
      }
      assertLess(Math.sqrt(error / norm), 1e-5, `turn ${turn}: ${m} x ${n} x ${k}`);
    }
  } finally {
    recorder.destroy();
    gpu.close();
  }
});
