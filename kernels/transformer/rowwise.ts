/**
 * The kernels that look at one row at a time: embedding, norms, RoPE with the cache's write, SwiGLU,
 * and the passage between frames and the residual.
 *
 * @module
 */
import type { Gpu } from "../gpu.ts";
import type { Kernel, StepShape } from "../kernel.ts";
import { Dispatch } from "./dispatch.ts";
import { type StepInputs, transformerWgsl } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";
import embedWgsl from "./embed.wgsl" with { type: "text" };
import { pairLanes, ropeKernelWgsl, swigluKernelWgsl } from "./pairs_wgsl.ts";
import { normShares, rmsnormWgsl } from "./rmsnorm_wgsl.ts";
import hiddenWgsl from "./hidden.wgsl" with { type: "text" };

/** Lanes of a workgroup in the kernels that have a thread per column, or per four. */
const LANES = 64;
const blocks = (columns: number) => Math.ceil(columns / LANES);

/** Which rows a kernel takes. */
export type PairRows = "all" | "prefill";

const rowCount = (shape: StepShape, rows: PairRows) =>
  rows === "all" ? shape.rows : shape.rows - shape.decodeRows;

/** Consecutive rows of the embedding table in a buffer of their own. */
export interface EmbeddingPiece {
  /** float16, `(tokens, hidden)`. */
  buffer: GPUBuffer;
  firstToken: number;
  tokens: number;
}

/**
 * The rows' token embeddings become the residual.
 *
 * @param options.residual float32, `(rows, hidden)`
 */
export async function createEmbedding(options: {
  gpu: Gpu;
  inputs: StepInputs;
  pieces: readonly EmbeddingPiece[];
  hidden: number;
  residual: GPUBuffer;
}): Promise<Kernel> {
  const { gpu, inputs, hidden, residual } = options;
  const pieces = await Promise.all(options.pieces.map((piece) =>
    Dispatch.create({
      gpu,
      label: "embedding",
      code: transformerWgsl(embedWgsl),
      constants: { hidden, first_token: piece.firstToken, tokens: piece.tokens },
      buffers: [inputs.step, inputs.rows, piece.buffer, residual],
      workgroups: (shape) => [blocks(hidden), shape.rows],
    })
  ));
  return {
    label: "embedding",
    encode: (pass, shape) => pieces.forEach((piece) => piece.encode(pass, shape)),
  };
}

/**
 * RMSNorm of every row.
 *
 * @param options.residual float32, `(rows, hidden)`
 * @param options.weight float32, `(hidden)`
 * @param options.normed float16, `(rows, hidden)`
 */
export function createRmsNorm(options: {
  gpu: Gpu;
  hidden: number;
  epsilon: number;
  residual: GPUBuffer;
  weight: GPUBuffer;
  normed: GPUBuffer;
}): Promise<Kernel> {
  const { gpu, hidden, epsilon, residual, weight, normed } = options;
  return Dispatch.create({
    gpu,
    label: "rmsnorm",
    code: rmsnormWgsl(hidden, epsilon, false),
    buffers: [residual, weight, normed],
    workgroups: (shape) => [normShares(hidden), shape.rows],
  });
}

/**
 * RMSNorm of the rows that have a request, gathered.
 *
 * @param options.normed float16, `(outputs, hidden)`; the rest as for {@linkcode createRmsNorm}
 */
export function createFinalNorm(options: {
  gpu: Gpu;
  inputs: StepInputs;
  hidden: number;
  epsilon: number;
  residual: GPUBuffer;
  weight: GPUBuffer;
  normed: GPUBuffer;
}): Promise<Kernel> {
  const { gpu, inputs, hidden, epsilon, residual, weight, normed } = options;
  return Dispatch.create({
    gpu,
    label: "final norm",
    code: rmsnormWgsl(hidden, epsilon, true),
    buffers: [residual, weight, normed, inputs.outputRows],
    workgroups: (shape) => [normShares(hidden), shape.outputs],
  });
}

/**
 * Turns queries (in place) and keys by their positions' angles, and writes keys and values into the
 * pages of the cache.
 *
 * @param options.angles of {@linkcode ropeAngles}
 * @param options.qkv float32, `(rows, (heads + 2 kvHeads) headDim)`
 * @param options.keys of {@linkcode kvPageBytes} per page
 * @param options.values like `keys`
 * @param options.rows all of them, or prefill rows where decode rows are turned as they are summed
 */
export function createRope(options: {
  gpu: Gpu;
  inputs: StepInputs;
  shape: HeadShape;
  angles: GPUBuffer;
  qkv: GPUBuffer;
  keys: GPUBuffer;
  values: GPUBuffer;
  rows?: PairRows;
}): Promise<Kernel> {
  const { gpu, inputs, shape: head, angles, qkv, keys, values, rows = "all" } = options;
  const half = head.headDim / 2;
  const threads = (head.heads + 2 * head.kvHeads) * half / pairLanes(half);
  return Dispatch.create({
    gpu,
    label: "rope",
    code: ropeKernelWgsl(head, rows),
    buffers: [inputs.step, qkv, inputs.rows, inputs.pageTables, angles, keys, values],
    workgroups: (shape) => [blocks(threads), rowCount(shape, rows)],
  });
}

/**
 * `silu(gate) * up`.
 *
 * @param options.gateUp float32, `(rows, 2 width)`: a row's gates, then its ups
 * @param options.gated float16, `(rows, width)`
 * @param options.rows all of them, or prefill rows where decode rows are multiplied as they are summed
 */
export function createSwiGlu(options: {
  gpu: Gpu;
  inputs: StepInputs;
  width: number;
  gateUp: GPUBuffer;
  gated: GPUBuffer;
  rows?: PairRows;
}): Promise<Kernel> {
  const { gpu, inputs, width, gateUp, gated, rows = "all" } = options;
  return Dispatch.create({
    gpu,
    label: "swiglu",
    code: swigluKernelWgsl(width, rows),
    buffers: [inputs.step, gateUp, gated],
    workgroups: (shape) => [blocks(width / pairLanes(width)), rowCount(shape, rows)],
  });
}

/**
 * The previous stage's rows become the residual.
 *
 * @param options.frame float16, `(rows, hidden)`
 * @param options.residual float32, `(rows, hidden)`
 */
export function createHiddenImport(options: {
  gpu: Gpu;
  inputs: StepInputs;
  hidden: number;
  frame: GPUBuffer;
  residual: GPUBuffer;
}): Promise<Kernel> {
  const { gpu, inputs, hidden, frame, residual } = options;
  return Dispatch.create({
    gpu,
    label: "hidden import",
    code: transformerWgsl(hiddenWgsl),
    entryPoint: "import_rows",
    constants: { hidden },
    buffers: [inputs.step, frame, residual],
    workgroups: (shape) => [blocks(hidden), shape.rows],
  });
}

/** The residual becomes the next stage's rows; buffers as for {@linkcode createHiddenImport}. */
export function createHiddenExport(options: {
  gpu: Gpu;
  inputs: StepInputs;
  hidden: number;
  residual: GPUBuffer;
  frame: GPUBuffer;
}): Promise<Kernel> {
  const { gpu, inputs, hidden, frame, residual } = options;
  return Dispatch.create({
    gpu,
    label: "hidden export",
    code: transformerWgsl(hiddenWgsl),
    entryPoint: "export_rows",
    constants: { hidden },
    buffers: [inputs.step, residual, frame],
    workgroups: (shape) => [blocks(hidden), shape.rows],
  });
}
