/**
 * Fits one matrix to the activations it sees: the error that counts is that of its outputs,
 * `tr((W_q - W) H (W_q - W)')` with `H = X'X` over the calibration text, the objective of GPTQ
 * (arXiv 2210.17323), AQLM (2401.06118) and GPTVQ (2402.15319).
 *
 * Codes are found by coordinate descent, block of columns by block of columns; in between, gradients
 * move codebooks and scales with the codes held, as AQLM alternates.
 *
 * @module
 */
import type { Gpu } from "../../kernels/gpu.ts";
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import { Adam } from "./adam.ts";
import { type CodedArrays, CodedMatrix, type HessianBand, startArrays } from "./coded_matrix.ts";
import type { Stopwatch } from "../phases.ts";
import { matmul } from "./matmul.ts";
import { type Operation, Recorder } from "./operation.ts";
import { dotProduct, rowwise } from "./rows.ts";

/** How long a matrix is fitted. */
export interface FitSettings {
  /** Rounds of a search for codes and steps for codebooks and scales. */
  fitRounds: number;
  /** Steps in each round. */
  fitSteps: number;
}

/** A fitted matrix. Errors are relative: `sqrt(tr(D H D') / tr(W H W'))`. */
export interface FittedMatrix {
  arrays: CodedArrays;
  /** With the nearest codes, before any of the calibration counted. */
  errorBefore: number;
  errorAfter: number;
}

/** Rate of codebooks and scales, relative to their size, at the height of the schedule. */
const RATE = 0.01;
/** Columns whose codes are searched before the gradient of all columns is brought up to date. */
const BLOCK_COLUMNS = 128;

/**
 * Fits a matrix.
 *
 * @param weights `(N, K)`
 * @param hessian damped, in bands that cover K in order; each ends where a group does
 * @param codebooks to begin with
 * @param watch takes the times of `read`, `codes` and `codebooks`
 */
export async function fitMatrix(
  gpu: Gpu,
  weights: Float32Array<ArrayBuffer>,
  [n, k]: readonly [n: number, k: number],
  hessian: readonly HessianBand[],
  codebooks: Float32Array<ArrayBuffer>,
  format: CodeGemmFormat,
  { fitRounds, fitSteps }: FitSettings,
  watch: Stopwatch,
): Promise<FittedMatrix> {
  const recorder = new Recorder(gpu);
  try {
    const target = recorder.buffer("target", n * k);
    await recorder.fill(target, weights);
    const start = startArrays(weights, codebooks, format);
    watch.lap("read");
    const matrix = new CodedMatrix(recorder, [n, k], format, start);
    const [now, difference, slope] = ["now", "difference", "slope"].map((label) =>
      recorder.buffer(label, n * k)
    );
    const slopeOf: Operation[] = [];
    for (const { buffer, first, rows } of hessian) {
      slopeOf.push(
        ...await matmul(recorder, {
          label: "slope",
          a: { buffer: difference, stride: k, offset: first },
          b: { buffer, stride: k },
          c: { buffer: slope, stride: k },
          m: n,
          n: k,
          k: rows,
          add: first > 0 ? "c" : undefined,
        }),
      );
    }
    const error = async () => Math.max(0, await dotProduct(recorder, difference, slope, n * k));
    recorder.run([recorder.copy(target, difference, n * k), ...slopeOf]);
    const whole = await error();
    const measure = [
      await matrix.dequantize(now, 0),
      await rowwise(recorder, "add", [now, target, difference], { columns: n * k, value: -1 }),
      ...slopeOf,
    ];
    const relative = async () => {
      recorder.run(measure);
      return whole === 0 ? 0 : Math.sqrt(await error() / whole);
    };

    recorder.run([await matrix.nearest(target)]);
    const errorBefore = await relative();
    const sweep = [...measure];
    const block = blockColumns(format.v);
    const change = recorder.buffer("change", n * block);
    for (const band of hessian) {
      const end = band.first + band.rows;
      for (let first = band.first; first < end; first += block) {
        const columns = Math.min(block, end - first), next = first + columns;
        sweep.push(await matrix.search(slope, band, change, first, columns));
        if (next === k) break;
        // The columns that are still to come; a sweep does not come back to those before.
        sweep.push(
          ...await matmul(recorder, {
            label: "slope change",
            a: { buffer: change, stride: columns },
            b: {
              buffer: band.buffer,
              stride: k,
              offset: (first - band.first) * k + next,
            },
            c: { buffer: slope, stride: k, offset: next },
            m: n,
            n: k - next,
            k: columns,
            add: "c",
          }),
        );
      }
    }
    const adam = new Adam(recorder);
    const back = await matrix.backward(slope, 0);
    const { counts } = matrix;
    const scaleSize = start.scales.reduce((sum, scale) => sum + scale, 0) / counts.scales;
    const step = [
      ...measure,
      ...back.operations,
      await adam.update(matrix.codebooks, back.codebooks, counts.codebooks, RATE),
      await adam.update(matrix.scales, back.scales, counts.scales, RATE * scaleSize),
    ];
    const lap = async (phase: "codes" | "codebooks") => {
      await recorder.settle();
      watch.lap(phase);
    };
    for (let round = 0; round < fitRounds; round++) {
      recorder.run(sweep);
      await lap("codes");
      for (let t = 0; t < fitSteps; t++) {
        adam.begin(round * fitSteps + t, fitRounds * fitSteps);
        recorder.run(step);
        await recorder.pace();
      }
      await lap("codebooks");
    }
    // Codes have the last word: they make good what the steps moved.
    if (fitRounds > 0) recorder.run(sweep);
    const errorAfter = await relative();
    const arrays = await matrix.arrays();
    await lap("codes");
    return { arrays, errorBefore, errorAfter };
  } finally {
    recorder.destroy();
  }
}

/** Whole vectors, and whole quads for the products. */
function blockColumns(v: number): number {
  const step = v % 4 === 0 ? v : v % 2 === 0 ? 2 * v : 4 * v;
  return Math.max(step, Math.floor(BLOCK_COLUMNS / step) * step);
}
