/**
 * Runs one linear layer on given rows and reads the result: for tests and the self-test.
 *
 * @module
 */
import type { NumericsProfile } from "../../shared/protocol.ts";
import { gaussian, seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import type { LinearStore, RowRange, StepShape } from "../kernel.ts";
import { stepWords } from "../kernel.ts";
import { linearScratchBytes } from "./binding.ts";
import { createInt8Rows } from "./int8_rows.ts";
import { createLinear } from "./linear.ts";
import type { Matrix } from "./types.ts";
import type { Variant } from "./variant.ts";

/** One run. */
export interface RigRun {
  matrix: Matrix;
  /** float16 bits; row r begins at `xOffset + r * xStride`. */
  x: Uint16Array<ArrayBuffer>;
  xStride?: number;
  xOffset?: number;
  /** What the output holds before, `yOffset + r * yStride`; zeros when left out. */
  y?: Float32Array<ArrayBuffer>;
  yStride?: number;
  yOffset?: number;
  shape: StepShape;
  /** Encoded in this order. */
  ranges: RowRange[];
  store?: LinearStore;
  maxRows?: number;
  scratchBytes?: number;
  profile?: NumericsProfile["decode"];
  variant?: Partial<Variant>;
}

/** The output buffer after the run, whole. */
export async function runLinear(gpu: Gpu, run: RigRun): Promise<Float32Array<ArrayBuffer>> {
  const { matrix, shape } = run;
  const rows = Math.max(shape.rows, shape.outputs);
  const maxRows = run.maxRows ?? rows;
  const yStride = run.yStride ?? matrix.n;
  const y = run.y ?? new Float32Array((run.yOffset ?? 0) + rows * yStride);
  const scratchBytes = run.scratchBytes ??
    linearScratchBytes([matrix.n, matrix.k], matrix.format, maxRows, matrix.order);
  const input = gpu.upload("rig x", run.x);
  const output = gpu.upload("rig y", y);
  const scratch = gpu.storage("rig scratch", scratchBytes);
  const int8Rows = createInt8Rows(gpu, matrix.k, rows);
  const step = gpu.buffer("rig step", 16, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST);
  gpu.write(step, 0, stepWords(shape));
  const linear = await createLinear({
    gpu,
    label: "rig",
    matrix,
    step,
    input: { buffer: input, stride: run.xStride ?? matrix.k, offset: run.xOffset ?? 0 },
    output: { buffer: output, stride: yStride, offset: run.yOffset ?? 0 },
    store: run.store ?? "store",
    maxRows,
    scratch,
    int8Rows,
    ranges: run.ranges,
    profile: { version: 1, decode: run.profile ?? "codegemm" },
    variant: run.variant,
  });
  const encoder = gpu.device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  for (const range of run.ranges) linear.encode(pass, shape, range);
  pass.end();
  gpu.device.queue.submit([encoder.finish()]);
  const result = new Float32Array(await gpu.read(output, y.byteLength));
  for (const buffer of [input, output, scratch, step, ...Object.values(int8Rows)]) buffer.destroy();
  linear.destroy();
  return result;
}

/** Float16 normal draws. */
export function randomActivations(count: number, seed: number): Float16Array<ArrayBuffer> {
  const random = seededRandom(seed);
  return Float16Array.from({ length: count }, () => gaussian(random)) as Float16Array<ArrayBuffer>;
}

/** The bits of float16 numbers. */
export function bitsOf(values: Float16Array<ArrayBuffer>): Uint16Array<ArrayBuffer> {
  return new Uint16Array(values.buffer, values.byteOffset, values.length);
}

/** A step with these rows. */
export function stepShape(decodeRows: number, prefillRows = 0, outputs = 0): StepShape {
  return { decodeRows, rows: decodeRows + prefillRows, outputs, contextTokens: 1 };
}
