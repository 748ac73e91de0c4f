/**
 * Every linear kernel against the exact product: dense, two codebook formats with both families of
 * decode kernels, and AQLM's 1x16, which has one.
 *
 * @module
 */
import { formatName } from "../../shared/checkpoint/mod.ts";
import { type CodeGemmFormat, ROW_SCALE } from "../../shared/model_config.ts";
import type { NumericsProfile } from "../../shared/protocol.ts";
import { loadMatrix, type MatrixShape, randomTensors } from "../linear/mod.ts";
import { dequantize, exactProduct, readCodeTensors } from "../linear/reference.ts";
import { randomActivations, runLinear } from "../linear/rig.ts";
import type { Workbench } from "../workbench.ts";
import type { Comparison } from "./check.ts";

const SHAPE: MatrixShape = [80, 512];
const DECODE_ROWS = 3;
const ROWS = 8;
const FORMATS: (CodeGemmFormat | null)[] = [
  null,
  { m: 1, v: 4, g: 128, b: 8 },
  { m: 2, v: 8, g: 128, b: 8 },
  { m: 1, v: 8, g: ROW_SCALE, b: 16 },
];
/** Of the sum of the products' magnitudes: float16 sums of up to 16 products, and float16 Psumbooks. */
const TOLERANCE = 2 ** -11;

/** Decode and prefill rows of a step through matrices of every kind. */
export async function checkLinear(bench: Workbench): Promise<Comparison[]> {
  const comparisons: Comparison[] = [];
  for (const format of FORMATS) {
    const families: NumericsProfile["decode"][] = format?.b === 8
      ? ["codegemm", "dequantize"]
      : ["codegemm"];
    for (const family of families) comparisons.push(await checkMatrix(bench, format, family));
  }
  return comparisons;
}

async function checkMatrix(
  { gpu }: Workbench,
  format: CodeGemmFormat | null,
  family: NumericsProfile["decode"],
): Promise<Comparison> {
  const [n, k] = SHAPE;
  const tensors = randomTensors("w", SHAPE, format, 5);
  const matrix = await loadMatrix(gpu, tensors, "w", SHAPE, format);
  const x = randomActivations(ROWS * k, 6);
  const y = await runLinear(gpu, {
    matrix,
    x: new Uint16Array(x.buffer),
    shape: { decodeRows: DECODE_ROWS, rows: ROWS, outputs: 0, contextTokens: 1 },
    ranges: ["decode", "prefill"],
    profile: family,
  });
  matrix.destroy();
  const weights = format
    ? dequantize(await readCodeTensors(tensors, "w", SHAPE, format))
    : new Float16Array((await tensors.read("w.weight", 0, 2 * n * k)).buffer);
  const exact = Array.from(
    { length: ROWS },
    (_, row) => exactProduct(weights, SHAPE, x.subarray(row * k, (row + 1) * k)),
  );
  const magnitudes = exact.flatMap(({ magnitude }) => [...magnitude]);
  const name = format ? `${formatName(format)}, ${family}` : "dense";
  return {
    kernel: `linear (${name})`,
    actual: y,
    expected: exact.flatMap(({ y }) => [...y]),
    tolerance: (i) => TOLERANCE * magnitudes[i],
    raw: y.buffer,
  };
}
