/**
 * Matrices of one shape bound to buffers of their own, to be timed: by autotuning and by benchmarks.
 *
 * @module
 */
import type { NumericsProfile } from "../../shared/protocol.ts";
import type { Gpu } from "../gpu.ts";
import { STEP_BYTES, type StepShape, stepWords } from "../kernel.ts";
import { linearScratchBytes } from "./binding.ts";
import { createInt8Rows } from "./int8_rows.ts";
import { createLinear } from "./linear.ts";
import type { Int8Rows, Linear, Matrix } from "./types.ts";
import type { Variant } from "./variant.ts";

/** How rows lie in the buffers of trials, and what becomes of their sums. */
export function trialLayout({ n, k }: Pick<Matrix, "n" | "k">) {
  return {
    input: { stride: k, offset: 0 },
    output: { stride: n, offset: 0 },
    store: "store",
  } as const;
}

/** What a matrix is bound for. */
export interface TrialRun {
  label: string;
  range: "decode" | "prefill";
  decode: NumericsProfile["decode"];
  variant?: Partial<Variant>;
}

/** Input, output, scratch and step of up to a given number of rows, of matrices of one shape. */
export class TrialBuffers {
  /** float32, N elements a row. */
  readonly output: GPUBuffer;
  readonly #gpu: Gpu;
  readonly #rows: number;
  readonly #input: GPUBuffer;
  readonly #scratch: GPUBuffer;
  readonly #step: GPUBuffer;
  readonly #int8Rows: Int8Rows;

  /** @param x float16 activations, K elements a row */
  constructor(gpu: Gpu, { n, k, format, order }: Matrix, x: Float16Array<ArrayBuffer>) {
    this.#gpu = gpu;
    this.#rows = x.length / k;
    this.#input = gpu.upload("trial x", new Uint16Array(x.buffer));
    this.output = gpu.storage("trial y", this.#rows * n * 4);
    const scratchBytes = linearScratchBytes([n, k], format, this.#rows, order);
    this.#scratch = gpu.storage("trial sums", scratchBytes);
    this.#int8Rows = createInt8Rows(gpu, k, this.#rows);
    const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
    this.#step = gpu.buffer("trial step", STEP_BYTES, usage);
  }

  /** Makes the next dispatches those of a step of `rows` rows; returns its shape. */
  setRows(range: TrialRun["range"], rows: number): StepShape {
    const decodeRows = range === "decode" ? rows : 0;
    const shape: StepShape = { decodeRows, rows, outputs: 0, contextTokens: 1 };
    this.#gpu.write(this.#step, 0, stepWords(shape));
    return shape;
  }

  /**
   * Binds a matrix of the shape.
   *
   * @throws FleetError `gpu` as `createLinear` does
   */
  bind(matrix: Matrix, { label, range, decode, variant }: TrialRun): Promise<Linear> {
    const { input, output, store } = trialLayout(matrix);
    return createLinear({
      gpu: this.#gpu,
      label,
      matrix,
      step: this.#step,
      input: { buffer: this.#input, ...input },
      output: { buffer: this.output, ...output },
      store,
      maxRows: this.#rows,
      scratch: this.#scratch,
      int8Rows: this.#int8Rows,
      ranges: [range],
      profile: { version: 0, decode },
      variant,
    });
  }

  destroy(): void {
    const { values, largest } = this.#int8Rows;
    const buffers = [this.#input, this.output, this.#scratch, this.#step, values, largest];
    for (const buffer of buffers) buffer.destroy();
  }
}
