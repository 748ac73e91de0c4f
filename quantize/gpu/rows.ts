/**
 * Recording the kernels of `rows.wgsl`; their plain-loop references are in the test.
 *
 * @module
 */
import { LINE_WORKGROUPS, lineWorkgroups, type Operation, type Recorder } from "./operation.ts";
import CODE from "./rows.wgsl" with { type: "text" };

/** Which inputs and outputs of `rows.wgsl` each kernel names, so that its layout has just those. */
const BINDINGS = {
  norm: [1, 2, 4, 5],
  norm_back: [1, 2, 3, 4, 5],
  norm_weight_back: [1, 2, 3, 4],
  softmax: [4],
  softmax_back: [1, 4],
  swiglu: [1, 4],
  swiglu_back: [1, 2, 4],
  reduce: [1, 4],
  add: [1, 2, 4],
  difference: [1, 2, 4, 5],
  distill: [1, 2, 4, 5],
  embed: [1, 2, 4],
  dot_product: [1, 2, 4],
  damp: [4],
} as const;

type RowKernel = keyof typeof BINDINGS;
const GRID: Record<RowKernel, "row" | "element" | "line"> = {
  norm: "row",
  norm_back: "row",
  norm_weight_back: "line",
  softmax: "line",
  softmax_back: "line",
  swiglu: "element",
  swiglu_back: "element",
  reduce: "line",
  add: "line",
  difference: "row",
  distill: "row",
  embed: "element",
  dot_product: "line",
  damp: "line",
};

/** Sizes of a row-wise kernel; what `extra` and `value` mean is said in `rows.wgsl`. */
export interface RowSizes {
  rows?: number;
  columns: number;
  extra?: number;
  value?: number;
  /** For kernels whose grid is not given by rows or elements. */
  workgroups?: readonly [x: number, y?: number];
}

/** Records a kernel of `rows.wgsl` on its inputs and outputs, in the order of its bindings. */
export function rowwise(
  recorder: Recorder,
  kernel: RowKernel,
  buffers: GPUBuffer[],
  { rows = 1, columns, extra = 0, value = 0, workgroups }: RowSizes,
): Promise<Operation> {
  const grid = workgroups ??
    (GRID[kernel] === "row"
      ? [Math.min(rows, LINE_WORKGROUPS), Math.ceil(rows / LINE_WORKGROUPS)] as const
      : lineWorkgroups(GRID[kernel] === "element" ? rows * columns : columns));
  return recorder.dispatch({
    label: kernel,
    code: CODE,
    entryPoint: kernel,
    constants: [rows, columns, extra, { f32: value }],
    buffers,
    bindings: BINDINGS[kernel],
    workgroups: grid,
  });
}

/** `out = [out +] sum of `rows` arrays of `columns` in `parts``, in order. */
export function reduce(
  recorder: Recorder,
  parts: GPUBuffer,
  out: GPUBuffer,
  columns: number,
  rows: number,
  add = false,
): Promise<Operation> {
  return rowwise(recorder, "reduce", [parts, out], { rows, columns, extra: add ? 1 : 0 });
}

/** Rows over which a norm's weight gradient is summed by one thread. */
const GRADIENT_ROWS = 64;

/** The gradient of a norm's weight, into `out (columns)`. */
export async function normWeightBack(
  recorder: Recorder,
  { x, gradient, inverse, out }: Record<"x" | "gradient" | "inverse" | "out", GPUBuffer>,
  rows: number,
  columns: number,
): Promise<Operation[]> {
  const chunks = Math.ceil(rows / GRADIENT_ROWS);
  const parts = recorder.buffer("norm gradient parts", chunks * columns);
  return [
    await rowwise(recorder, "norm_weight_back", [x, gradient, inverse, parts], {
      rows,
      columns,
      extra: GRADIENT_ROWS,
      workgroups: [Math.ceil(columns / 256), chunks],
    }),
    await reduce(recorder, parts, out, columns, chunks),
  ];
}

const DOT_WORKGROUPS = 64;

/** The inner product of two buffers of `count` floats; waits for the GPU. */
export async function dotProduct(
  recorder: Recorder,
  a: GPUBuffer,
  b: GPUBuffer,
  count: number,
): Promise<number> {
  const parts = recorder.buffer("dot product", DOT_WORKGROUPS);
  recorder.run([
    await rowwise(recorder, "dot_product", [a, b, parts], {
      columns: count,
      workgroups: [DOT_WORKGROUPS],
    }),
  ]);
  return (await recorder.floats(parts, DOT_WORKGROUPS)).reduce((sum, part) => sum + part, 0);
}
