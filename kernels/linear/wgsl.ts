/**
 * Pieces of WGSL that the generated linear kernels share.
 *
 * @module
 */
import { STEP_WGSL } from "../kernel.ts";
import type { LinearStore } from "../kernel.ts";

/** What a kernel does with its sums: into the scratch, or into the output. */
export type Target = "partial" | LinearStore;

/** Rows that a decode workgroup may take at once. */
export const BATCHES = [1, 2, 4, 8, 16] as const;
export type Batch = typeof BATCHES[number];

/** Values of {@linkcode PARAM_WORDS}`.range`. */
export const RANGE_CODES = { decode: 0, prefill: 1, outputs: 2 } as const;

/** The words of a dispatch's uniform, in order. */
export const PARAM_WORDS = [
  /** Rows of N in this binding block. */
  "n",
  "k",
  "x_stride",
  "x_offset",
  "y_stride",
  /** Of the binding block's first row of N. */
  "y_offset",
  "units",
  "split_units",
  "splits",
  /** The first row of this dispatch, counted within its range. */
  "row_base",
  /** Rows that the scratch holds. */
  "row_cap",
  /** Elements of a row of partial sums. */
  "partial_stride",
  "range",
  /** The row blocks of this binding block where the second and third matrix of a stack begin. */
  "book_1",
  "book_2",
] as const;

/** Uniform bytes of one dispatch. */
export const PARAM_BYTES = Math.ceil(PARAM_WORDS.length / 4) * 16;

/** One dispatch's uniform. */
export type Params = Record<typeof PARAM_WORDS[number], number>;

/** Everything that stands before a kernel's own bindings; those begin at `@binding(2)`. */
export const HEADER_WGSL = /* wgsl */ `
enable f16;
${STEP_WGSL}
struct Params {
${PARAM_WORDS.map((word) => `  ${word}: u32,`).join("\n")}
}
@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<uniform> params: Params;

// Rows of the range, and the first one's index in the views.
fn range_rows() -> u32 {
  switch params.range {
    case ${RANGE_CODES.decode}u: { return step.decode_rows; }
    case ${RANGE_CODES.prefill}u: { return step.rows - step.decode_rows; }
    default: { return step.outputs; }
  }
}
// The matrix of a stack that a row block belongs to, and so its codebooks.
fn book_of(block: u32) -> u32 {
  return select(0u, 1u, block >= params.book_1) + select(0u, 1u, block >= params.book_2);
}
fn range_start() -> u32 {
  return select(0u, step.decode_rows, params.range == ${RANGE_CODES.prefill}u);
}
`;

/**
 * `put(row, n, value)`: one finished sum into the output, row counted within the view. Of an output of
 * vectors, `put_quad`: four of them, `n` a multiple of 4.
 *
 * Rounding to float16 is asked for by `quantizeToF16`: NVIDIA's compiler takes `f32(f16(x))`, and
 * `unpack2x16float(pack2x16float(x))` too, for `x` itself and rounds nothing (seen on an H200 with
 * driver 580). Values beyond float16's range are clamped, because WGSL leaves them open.
 */
export function putWgsl(store: LinearStore, lanes: 1 | 4 = 1): string {
  const type = lanes === 1 ? "f32" : "vec4<f32>";
  const value = {
    "store": "value",
    "add": "y[at] + value",
    "add-round": `quantizeToF16(clamp(y[at] + value, ${type}(-65504.0), ${type}(65504.0)))`,
  }[store];
  return /* wgsl */ `
fn ${lanes === 1 ? "put" : "put_quad"}(row: u32, n: u32, value: ${type}) {
  let at = (params.y_offset + row * params.y_stride + n) / ${lanes}u;
  y[at] = ${value};
}
`;
}

/**
 * A batch of rows as vectors of up to four: a row is a lane, so each row's arithmetic is the same
 * whatever the batch.
 */
export interface BatchLanes {
  /** Vectors of a batch. */
  vectors: number;
  /** Rows of one vector. */
  lanes: number;
  /** The WGSL type of one vector. */
  type(element: "f16" | "f32"): string;
  /** Row `row`'s lane of the vector variables `name0`, `name1` and so on. */
  lane(name: string, row: number): string;
}

/** How a batch is laid out in vectors. */
export function batchLanes(batch: Batch): BatchLanes {
  const lanes = Math.min(batch, 4);
  return {
    vectors: batch / lanes,
    lanes,
    type: (element) => lanes === 1 ? element : `vec${lanes}<${element}>`,
    lane: (name, row) =>
      lanes === 1 ? `${name}0` : `${name}${Math.floor(row / lanes)}.${"xyzw"[row % lanes]}`,
  };
}

/** Statements that decode kernels begin with: `rows` of the range, the `first` one of this batch. */
export function firstRowWgsl(batch: Batch): string {
  return `  let rows = range_rows();
  let first = params.row_base + workgroup.z * ${batch}u;
  if (first >= rows) { return; }`;
}

/**
 * The statements of {@linkcode firstRowWgsl}, and for each place of the batch where the row's input
 * begins, `x<place>`. Places past the last row compute it again, and must store nothing: no stale row is
 * ever read.
 *
 * @param inputAt WGSL of where the input of a row of the range begins, by default in elements
 */
export function batchRowsWgsl(
  batch: Batch,
  inputAt = (row: string) => `params.x_offset + (range_start() + ${row}) * params.x_stride`,
): string {
  return `${firstRowWgsl(batch)}
${times(batch, (b) => `  let x${b} = ${inputAt(`min(first + ${b}u, rows - 1u)`)};`)}`;
}

/** `count` strings. */
export function times(count: number, make: (i: number) => string): string {
  return Array.from({ length: count }, (_, i) => make(i)).join("\n");
}

/**
 * A statement that runs `body` for every `i` in `[0, count)`, spread over the workgroup's threads;
 * `body` reads `i`. Unrolled, if wanted, where it divides evenly, since loops cost more than they look.
 */
export function spread(count: number, threads: number, unroll: boolean, body: string): string {
  if (count === threads || (unroll && count % threads === 0 && count / threads <= 4)) {
    return times(count / threads, (j) => `{ let i = lane + ${j * threads}u;\n${body} }`);
  }
  return `for (var i = lane; i < ${count}u; i += ${threads}u) {\n${body}\n}`;
}
