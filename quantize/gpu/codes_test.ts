import { assertEquals, assertLess } from "@std/assert";
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import { gaussian, randomInt, seededRandom } from "../../shared/random.ts";
import { type CodedArrays, CodedMatrix } from "./coded_matrix.ts";
import { withRecorder } from "./testing.ts";

const N = 12, K = 64;

const random = seededRandom(5);
const normal = (count: number) => Float32Array.from({ length: count }, () => gaussian(random));

function randomCoded({ m, v, g }: CodeGemmFormat): CodedArrays {
  return {
    codes: Uint32Array.from({ length: N * K / v * m }, () => randomInt(random, 256)),
    codebooks: normal(m * 256 * v),
    scales: Float32Array.from({ length: N * K / g }, () => 0.5 + random()),
  };
}

function weightsReference({ codes, codebooks, scales }: CodedArrays, format: CodeGemmFormat) {
  const { m, v, g } = format;
  return Float64Array.from({ length: N * K }, (_, at) => {
    let sum = 0;
    for (let j = 0; j < m; j++) {
      sum += codebooks[(j * 256 + codes[Math.floor(at / v) * m + j]) * v + at % v];
    }
    return sum * scales[Math.floor(at / g)];
  });
}

function near(actual: ArrayLike<number>, expected: ArrayLike<number>, within = 1e-5) {
  assertEquals(actual.length, expected.length);
  let error = 0, norm = 0;
  for (let i = 0; i < expected.length; i++) {
    error += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  assertLess(Math.sqrt(error / norm), within);
}

const FORMATS: CodeGemmFormat[] = [
  { m: 1, v: 4, g: 16, b: 8 },
  { m: 2, v: 8, g: 32, b: 8 },
  { m: 3, v: 16, g: 16, b: 8 },
];

Deno.test("dequantizing and its gradients agree with plain loops", () =>
  withRecorder(async (recorder) => {
    for (const format of FORMATS) {
      const { m, v, g } = format;
      const arrays = randomCoded(format), gradient = normal((N + 2) * K);
      const matrix = new CodedMatrix(recorder, [N, K], format, arrays);
      const weights = recorder.buffer("weights", (N + 2) * K);
      const back = await matrix.backward(recorder.upload("gradient", gradient), 2);
      recorder.run([await matrix.dequantize(weights, 2), ...back.operations]);
      const expected = weightsReference(arrays, format);
      near((await recorder.floats(weights, (N + 2) * K)).subarray(2 * K), expected);
      const scales = new Float64Array(arrays.scales.length);
      const codebooks = new Float64Array(arrays.codebooks.length);
      expected.forEach((weight, at) => {
        const slope = gradient[2 * K + at], group = Math.floor(at / g);
        scales[group] += slope * weight / arrays.scales[group];
        for (let j = 0; j < m; j++) {
          const code = arrays.codes[Math.floor(at / v) * m + j];
          codebooks[(j * 256 + code) * v + at % v] += slope * arrays.scales[group];
        }
      });
      near(await recorder.floats(back.scales, scales.length), scales);
      near(await recorder.floats(back.codebooks, codebooks.length), codebooks);
      assertEquals(await matrix.arrays(), arrays);
    }
  }));

/** `tr((W_q - W) H (W_q - W)')` */
function weightedError(difference: ArrayLike<number>, hessian: Float32Array): number {
  let sum = 0;
  for (let n = 0; n < N; n++) {
    for (let i = 0; i < K; i++) {
      for (let j = 0; j < K; j++) {
        sum += difference[n * K + i] * hessian[i * K + j] * difference[n * K + j];
      }
    }
  }
  return sum;
}

Deno.test("the search takes, vector by vector, the code of the smallest weighted error", () =>
  withRecorder(async (recorder) => {
    const format = FORMATS[0], { v } = format, first = 16, columns = 32;
    const arrays = randomCoded(format), weights = normal(N * K), x = normal(3 * K);
    const hessian = Float32Array.from({ length: K * K }, (_, at) => {
      let sum = at % K === Math.floor(at / K) ? 0.1 : 0;
      for (let row = 0; row < 3; row++) sum += x[row * K + at % K] * x[row * K + (at / K | 0)];
      return sum;
    });
    const before = weightsReference(arrays, format);
    const difference = before.map((weight, at) => weight - weights[at]);
    const slope = Float32Array.from({ length: N * K }, (_, at) => {
      let sum = 0;
      for (let i = 0; i < K; i++) {
        sum += difference[(at / K | 0) * K + i] * hessian[i * K + at % K];
      }
      return sum;
    });
    const matrix = new CodedMatrix(recorder, [N, K], format, arrays);
    const change = recorder.buffer("change", N * columns);
    recorder.run([
      await matrix.search(
        recorder.upload("slope", slope),
        { buffer: recorder.upload("hessian", hessian), first: 0, rows: K },
        change,
        first,
        columns,
      ),
    ]);
    const found = await matrix.arrays();
    // The same walk in plain loops, the whole error worked out for every candidate of one row.
    const expected = { ...arrays, codes: arrays.codes.slice() };
    for (let position = first / v; position < (first + columns) / v; position++) {
      const at = position; // Row 0.
      const errors = Array.from({ length: 256 }, (_, code) => {
        expected.codes[at] = code;
        const row = weightsReference(expected, format).map((weight, i) =>
          i < K ? weight - weights[i] : 0
        );
        return weightedError(row, hessian);
      });
      expected.codes[at] = errors.indexOf(Math.min(...errors));
    }
    assertEquals(found.codes.slice(0, K / v), expected.codes.slice(0, K / v));
    const after = weightsReference(found, format);
    assertLess(
      weightedError(after.map((weight, at) => weight - weights[at]), hessian),
      weightedError(difference, hessian) * 0.7,
    );
    const moved = Array.from({ length: N * columns }, (_, i) => {
      const at = Math.floor(i / columns) * K + first + i % columns;
      return after[at] - before[at];
    });
    near(await recorder.floats(change, N * columns), moved, 1e-4);
  }));

Deno.test("the nearest codes are the nearest", () =>
  withRecorder(async (recorder) => {
    const format = FORMATS[0], { v } = format;
    const arrays = randomCoded(format), weights = normal(N * K);
    const matrix = new CodedMatrix(recorder, [N, K], format, arrays);
    recorder.run([await matrix.nearest(recorder.upload("weights", weights))]);
    const { codes } = await matrix.arrays();
    const expected = codes.map((_, vector) => {
      const errors = Array.from({ length: 256 }, (_, code) => {
        let sum = 0;
        for (let d = 0; d < v; d++) {
          const scale = arrays.scales[Math.floor(vector * v / format.g)];
          sum += (scale * arrays.codebooks[code * v + d] - weights[vector * v + d]) ** 2;
        }
        return sum;
      });
      return errors.indexOf(Math.min(...errors));
    });
    assertEquals(codes, expected);
  }));
