/**
 * Every linear kernel against the exact product: dense, two codebook formats with all families of
 * kernels, and AQLM's 1x16, which has one. The product of integers is that of the values they stand
 * for.
 *
 * @module
 */
import { formatName } from "../../shared/checkpoint/mod.ts";
import { type CodeGemmFormat, ROW_SCALE } from "../../shared/model_config.ts";
import type { NumericsProfile } from "../../shared/protocol.ts";
import { defaultVariant, loadMatrix, type MatrixShape, randomTensors } from "../linear/mod.ts";
import { mostRows } from "../linear/prefill_tile.ts";
import { roundToInt8 } from "../linear/int8.ts";
import { int8GroupK } from "../linear/order.ts";
import { dequantize, exactProduct, readCodeTensors } from "../linear/reference.ts";
import { randomActivations, runLinear } from "../linear/rig.ts";
import { decodeFamily, familyBatches } from "../linear/variant.ts";
import type { Workbench } from "../workbench.ts";
import type { Comparison } from "./check.ts";

/** K of more splits than are summed in one go. */
const SHAPE: MatrixShape = [80, 1280];
const FORMATS: (CodeGemmFormat | null)[] = [
  null,
  { m: 1, v: 4, g: 128, b: 8 },
  { m: 2, v: 8, g: 128, b: 8 },
  { m: 1, v: 8, g: ROW_SCALE, b: 16 },
];
/** Of the sum of the products' magnitudes: float16 sums of up to 16 products, and float16 Psumbooks. */
const TOLERANCE = 2 ** -11;

/** Decode rows in every batch, and prefill rows in every tile, through matrices of every kind. */
export async function checkLinear(bench: Workbench): Promise<Comparison[]> {
  const comparisons: Comparison[] = [];
  for (const format of FORMATS) comparisons.push(...await checkFormat(bench, format));
  return comparisons;
}

async function checkFormat(
  { gpu }: Workbench,
  format: CodeGemmFormat | null,
): Promise<Comparison[]> {
  const [n, k] = SHAPE;
  const variant = defaultVariant(gpu.info.software);
  const decodeFamilies: NumericsProfile["decode"][] = format?.b === 8
    ? ["codegemm", "dequantize", "int8"]
    : ["codegemm"];
  // One row less than a tile holds.
  const prefillRows = variant.prefillTiles.map((tile) => mostRows(tile) - 1);
  const most = Math.max(...variant.batches) + Math.max(...prefillRows);
  const tensors = randomTensors("w", SHAPE, format, 5);
  const x = randomActivations(most * k, 6);
  const codes = format && await readCodeTensors(tensors, "w", SHAPE, format);
  const weights = codes
    ? dequantize(codes)
    : new Float16Array((await tensors.read("w.weight", 0, 2 * n * k)).buffer);
  const exact = exactRows(weights, x);
  const matrix = await loadMatrix(gpu, tensors, "w", SHAPE, format);
  const comparisons: Comparison[] = [];
  for (const decode of decodeFamilies) {
    const { expected, magnitudes } = codes && decode === "int8"
      ? exactRows(
        dequantize({ ...codes, codebooks: roundedGroups(codes.codebooks) }),
        roundedGroups(x, int8GroupK(matrix)),
      )
      : exact;
    const family = decodeFamily(matrix, { decode });
    const batches = familyBatches(variant, family);
    for (let i = 0; i < Math.max(batches.length, prefillRows.length); i++) {
      const decodeRows = batches[i % batches.length];
      const rows = decodeRows + prefillRows[i % prefillRows.length];
      const y = await runLinear(gpu, {
        matrix,
        x: new Uint16Array(x.buffer, 0, rows * k),
        shape: { decodeRows, rows, outputs: 0, contextTokens: 1 },
        ranges: ["decode", "prefill"],
        profile: decode,
      });
      const name = format ? `${formatName(format)}, ${family}` : "dense";
      comparisons.push({
        kernel: `linear (${name}), ${decodeRows} rows of ${rows}`,
        actual: y,
        expected: expected.slice(0, rows * n),
        tolerance: (i) => TOLERANCE * magnitudes[i],
        raw: y.buffer,
      });
    }
  }
  matrix.destroy();
  return comparisons;
}

/** The exact products of rows of activations, one behind the other, and what errors scale with. */
function exactRows(weights: ArrayLike<number>, x: ArrayLike<number>) {
  const [, k] = SHAPE;
  const values = Float64Array.from(x);
  const rows = Array.from(
    { length: x.length / k },
    (_, row) => exactProduct(weights, SHAPE, values.subarray(row * k, (row + 1) * k)),
  );
  return {
    expected: rows.flatMap(({ y }) => [...y]),
    magnitudes: rows.flatMap(({ magnitude }) => [...magnitude]),
  };
}

/** What the integers stand for that groups of values are rounded to; all values are one by default. */
function roundedGroups(values: ArrayLike<number>, group = values.length): Float64Array {
  const all = Float64Array.from(values);
  for (let at = 0; at < all.length; at += group) {
    const { q, scale } = roundToInt8(all.subarray(at, at + group));
    q.forEach((integer, i) => all[at + i] = integer * scale);
  }
  return all;
}
