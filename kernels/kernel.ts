/**
 * What every kernel has in common.
 *
 * A kernel is made once, at load, bound to its buffers; running it is one call that sets a pipeline
 * and a bind group and dispatches. Counts that change from step to step are read from the step's
 * uniform buffer, so bind groups never change.
 *
 * @module
 */

/** The counts of one step. */
export interface StepShape {
  /** Rows `[0, decodeRows)` are decode rows, `[decodeRows, rows)` prefill rows. */
  decodeRows: number;
  rows: number;
  /** Rows of the output head (requests of the step). */
  outputs: number;
  /** The largest position of a row, plus one, or somewhat more. */
  contextTokens: number;
}

/** WGSL of the step's uniform: bind it as `var<uniform> step: Step;`. */
export const STEP_WGSL = /* wgsl */ `
struct Step {
  decode_rows: u32,
  rows: u32,
  outputs: u32,
  context_tokens: u32,
}
`;

/** Bytes of the step's uniform. */
export const STEP_BYTES = 16;

/** The uniform's words, in the order of {@linkcode STEP_WGSL}. */
export function stepWords(shape: StepShape): Uint32Array<ArrayBuffer> {
  return Uint32Array.of(shape.decodeRows, shape.rows, shape.outputs, shape.contextTokens);
}

/** A kernel bound to its buffers. */
export interface Kernel {
  readonly label: string;
  /** Adds its dispatches to the pass; none when the step has no rows for it. */
  encode(pass: GPUComputePassEncoder, shape: StepShape): void;
}

/** Which rows of a step an operation runs on, and so which kernel family. */
export type RowRange = "decode" | "prefill" | "outputs";

/** A matrix of rows in a buffer: row r starts at element `offset + r * stride`. */
export interface RowsView {
  buffer: GPUBuffer;
  /** Elements from one row to the next. */
  stride: number;
  /** Elements before row 0's first one. */
  offset: number;
}

/** What becomes of a linear layer's product. All in float32. */
export type LinearStore =
  /** `out = W x` */
  | "store"
  /** `out += W x` */
  | "add"
  /** `out = f16(out + W x)`: the residual at the end of a layer (DESIGN: whether or not a stage ends). */
  | "add-round";
