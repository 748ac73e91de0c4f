import { assert, assertAlmostEquals, assertEquals, assertLess, assertThrows } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { gaussian, seededRandom } from "../shared/random.ts";
import { parseFormat } from "./format.ts";
import { quantizeMatrix, reconstruct, type StoredMatrix } from "./matrix.ts";

const SETTINGS = { rounds: 4, sampleVectors: 4096 };

/** Gaussian weights whose size changes from group to group, as float32. */
function matrix(shape: [n: number, k: number], seed = 1): StoredMatrix {
  const random = seededRandom(seed);
  const weights = Float32Array.from(
    { length: shape[0] * shape[1] },
    (_, i) => gaussian(random) * 0.02 * (1 + Math.floor(i / 16) % 5),
  );
  return { name: "m", dtype: "F32", shape, bytes: new Uint8Array(weights.buffer) };
}

const weightsOf = ({ bytes }: StoredMatrix) => new Float32Array(bytes.buffer);

function relativeError(weights: Float32Array, other: Float32Array): number {
  let error = 0, norm = 0;
  for (let i = 0; i < weights.length; i++) {
    error += (weights[i] - other[i]) ** 2;
    norm += weights[i] ** 2;
  }
  return Math.sqrt(error / norm);
}

function quantize(input: StoredMatrix, format: string, settings = SETTINGS, seed = 7) {
  return quantizeMatrix(input, parseFormat(format), settings, seededRandom(seed));
}

Deno.test("the layout that is written decodes, by its definition, to what was measured", () => {
  for (const format of ["m1v4g16", "m2v4g32", "m1v8g32", "m2v2g8", "m3v1g4", "m1v6g48"]) {
    const input = matrix([20, format.includes("v6") ? 48 : 64]);
    const quantized = quantize(input, format);
    const decoded = reconstruct(quantized, parseFormat(format), input.shape);
    assertAlmostEquals(
      relativeError(weightsOf(input), decoded),
      quantized.relativeError,
      1e-5,
      format,
    );
    assertLess(quantized.relativeError, 0.6, format);
  }
});

Deno.test("sizes are those of the published layout", () => {
  const { codes, codebooks, scales } = quantize(matrix([24, 64]), "m2v4g32");
  assertEquals(codes.length, 2 * (64 / 4 / 4) * 24);
  assertEquals(codebooks.length, 2 * 256 * 4);
  assertEquals(scales.length, (64 / 32) * 24);
});

Deno.test("more codebooks, shorter vectors and more rounds each leave less error", () => {
  const input = matrix([64, 256]);
  const error = (format: string, rounds = 4) =>
    quantize(input, format, { rounds, sampleVectors: 2 ** 13 }).relativeError;
  const one = error("m1v4g16"), two = error("m2v4g16"), three = error("m3v4g16");
  assertLess(two, 0.6 * one);
  assertLess(three, 0.6 * two);
  assertLess(error("m1v2g16"), one);
  assertLess(error("m2v4g16", 8), error("m2v4g16", 0));
});

Deno.test("the same seed gives the same bytes, another seed others", () => {
  const input = matrix([32, 128]);
  assertEquals(quantize(input, "m2v4g32"), quantize(input, "m2v4g32"));
  const other = quantize(input, "m2v4g32", SETTINGS, 8);
  assert(quantize(input, "m2v4g32").codes.some((word, i) => word !== other.codes[i]));
});

Deno.test("a matrix of few distinct vectors is kept almost exactly", () => {
  const input = matrix([32, 64]);
  const weights = weightsOf(input);
  for (let i = 0; i < weights.length; i++) weights[i] = [0.5, -0.5, 0.25, 1][(i * 7) % 4];
  assertLess(quantize(input, "m1v4g16").relativeError, 2e-3);
});

Deno.test("groups of zeros stay zeros, and a matrix of zeros has no error", () => {
  const input = matrix([16, 64]);
  weightsOf(input).fill(0, 0, 64);
  const quantized = quantize(input, "m1v4g16");
  const decoded = reconstruct(quantized, parseFormat("m1v4g16"), input.shape);
  assert(decoded.subarray(0, 64).every((weight) => weight === 0));
  weightsOf(input).fill(0);
  const zeros = quantize(input, "m2v4g16");
  assertEquals(zeros.relativeError, 0);
  assert(reconstruct(zeros, parseFormat("m2v4g16"), input.shape).every((weight) => weight === 0));
});

Deno.test("a large matrix is trained on a sample, and encoded whole", () => {
  const input = matrix([256, 256]);
  const whole = quantize(input, "m1v4g16", { rounds: 2, sampleVectors: 2 ** 14 });
  const sampled = quantize(input, "m1v4g16", { rounds: 2, sampleVectors: 2048 });
  assertLess(sampled.relativeError, 1.25 * whole.relativeError);
  const decoded = reconstruct(sampled, parseFormat("m1v4g16"), input.shape);
  assertAlmostEquals(relativeError(weightsOf(input), decoded), sampled.relativeError, 1e-5);
});

Deno.test("a shape that does not suit the format is refused by the matrix's name", () => {
  const input = { ...matrix([8, 24]), name: "model.layers.3.mlp.up_proj" };
  const error = assertThrows(() => quantize(input, "m1v4g16"), FleetError, input.name);
  assertEquals(error.code, "bad-checkpoint");
});

Deno.test("formats are read as people write them", () => {
  assertEquals(parseFormat("m1v4g128"), { m: 1, v: 4, g: 128, b: 8 });
  for (const bad of ["", "m1v4", "m0v4g128", "m1v4g0", "m1v8g12", "M1V4G128", "m1v4g128b16"]) {
    assertEquals(assertThrows(() => parseFormat(bad), FleetError).code, "bad-usage");
  }
  assertThrows(() => parseFormat("m1v8b16"), FleetError, "codes of 8 bits only");
});
