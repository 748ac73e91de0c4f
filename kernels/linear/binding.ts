/**
 * What the dispatches of a linear layer are bound to: their uniforms, their scratch, their bind groups.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import { type CodeGemmFormat, matrixFormat } from "../../shared/model_config.ts";
import type { BindingKind, Gpu } from "../gpu.ts";
import type { RowRange } from "../kernel.ts";
import { STEP_BYTES } from "../kernel.ts";
import type { SplitOrder } from "./order.ts";
import { codeOrder, decodeSplits, denseOrder, roundUp } from "./order.ts";
import { type PrefillCode, prefillSplits } from "./prefill_tile.ts";
import type { LinearOptions, Matrix, MatrixBlock, MatrixShape } from "./types.ts";
import { decodeFamily } from "./variant.ts";
import type { Params } from "./wgsl.ts";
import { BATCHES, PARAM_BYTES, PARAM_WORDS, RANGE_CODES } from "./wgsl.ts";

/** Rows that the scratch holds are a multiple of this, or a power of two below it. */
const MAX_BATCH = Math.max(...BATCHES);
/** Scratch beyond which more rows take more dispatches instead. */
const SCRATCH_BYTES = 64 * 1024 * 1024;

/**
 * Scratch that a linear layer wants for its partial sums, bytes; 16 when it needs none.
 *
 * @param maxRows rows of the largest range that runs decode kernels
 */
export function linearScratchBytes(
  shape: MatrixShape,
  format: CodeGemmFormat | null,
  maxRows: number,
  order = format === null ? denseOrder(shape) : codeOrder(shape, format),
): number {
  const row = Math.max(
    partialRowBytes(shape[0], order),
    prefillRowBytes(shape, format, order),
    order.kind === "code" ? partialRowBytes(shape[0], order.dequantize) : 0,
  );
  if (row === 0) return 16;
  const affordable = Math.max(1, Math.floor(SCRATCH_BYTES / row / MAX_BATCH)) * MAX_BATCH;
  return row * Math.min(roundUp(maxRows, MAX_BATCH), affordable);
}

/** Bytes of one row's partial sums; 0 when it has none. */
function partialRowBytes(n: number, { splits, rowBlock }: SplitOrder): number {
  return splits === 1 ? 0 : splits * roundUp(n, rowBlock) * 4;
}

/** The codes of a matrix, as prefill kernels want them; null for dense. */
export function prefillCodes(
  { format, order }: Pick<Matrix, "format" | "order">,
): PrefillCode | null {
  return order.kind === "code" && format !== null ? { format, order } : null;
}

/** Bytes of one prefill row's partial sums; 0 when it has none. */
function prefillRowBytes(
  shape: MatrixShape,
  format: CodeGemmFormat | null,
  order: Matrix["order"],
): number {
  const code = prefillCodes({ format: format && matrixFormat(format, shape[1]), order });
  const { splits } = prefillSplits(shape, code);
  return partialRowBytes(shape[0], { ...order, splits });
}

/** How the decode rows of a layer split K. */
export function layerSplits(
  { matrix, profile }: Pick<LinearOptions, "matrix" | "profile">,
): SplitOrder {
  return decodeSplits(matrix.order, decodeFamily(matrix, profile));
}

/** Rows that a chunk of decode rows may have: what the scratch holds, or all where none is needed. */
export function chunkRows(options: LinearOptions): number {
  const { gpu, matrix, scratch, maxRows, label } = options;
  const row = partialRowBytes(matrix.n, layerSplits(options));
  if (row === 0) return roundUp(maxRows, MAX_BATCH);
  const bytes = Math.min(scratch.size, gpu.limits.maxStorageBufferBindingSize);
  const rows = Math.floor(bytes / row);
  invariant(rows >= 1, `the scratch of ${scratch.size} bytes holds a row of ${label}`);
  if (rows < MAX_BATCH) return 1 << Math.floor(Math.log2(rows));
  return Math.min(rows - rows % MAX_BATCH, roundUp(maxRows, MAX_BATCH));
}

/** Rows that a chunk of prefill rows may have. */
export function prefillChunkRows({ gpu, matrix, scratch, maxRows }: LinearOptions): number {
  const row = prefillRowBytes([matrix.n, matrix.k], matrix.format, matrix.order);
  if (row === 0) return Math.max(1, maxRows);
  const bytes = Math.min(scratch.size, gpu.limits.maxStorageBufferBindingSize);
  return Math.min(Math.floor(bytes / row), Math.max(1, maxRows));
}

/** Whether the input can be bound as vectors of 4. */
export function isVectorInput(
  { input, matrix: { k } }: { input: { stride: number; offset: number }; matrix: { k: number } },
): boolean {
  return [input.stride, input.offset, k].every((elements) => elements % 4 === 0);
}

/** Whether the output can be bound as vectors of 4. */
export function isVectorOutput(
  { output, matrix: { n } }: { output: { stride: number; offset: number }; matrix: { n: number } },
): boolean {
  return [output.stride, output.offset, n].every((elements) => elements % 4 === 0);
}

/** The uniforms of a layer's dispatches, in one buffer. */
export class Uniforms {
  readonly buffer: GPUBuffer;
  readonly #words: Uint32Array<ArrayBuffer>;
  readonly #stride: number;
  readonly #options: LinearOptions;
  #count = 0;

  constructor(options: LinearOptions) {
    const { gpu, matrix, ranges, maxRows, label } = options;
    this.#options = options;
    this.#stride = roundUp(PARAM_BYTES, gpu.limits.minUniformBufferOffsetAlignment);
    const chunks = Math.ceil(maxRows / chunkRows(options));
    const prefillChunks = Math.ceil(maxRows / prefillChunkRows(options));
    const entries = ranges.reduce(
      (sum, range) => sum + (range === "prefill" ? prefillChunks : chunks),
      0,
    );
    // Of each range, one more for the rounding of its rows.
    const bytes = (entries * matrix.blocks.length + ranges.length) * this.#stride;
    this.#words = new Uint32Array(bytes / 4);
    this.buffer = gpu.buffer(
      `${label} uniforms`,
      bytes,
      GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST,
    );
  }

  add(
    block: MatrixBlock,
    at: { row_base: number; row_cap: number; range: RowRange },
  ): GPUBufferBinding {
    const { matrix, input, output } = this.#options;
    const { units, splitUnits, splits } = layerSplits(this.#options);
    const params: Params = {
      n: block.n,
      k: matrix.k,
      x_stride: input.stride,
      x_offset: input.offset,
      y_stride: output.stride,
      y_offset: output.offset + block.start,
      units,
      split_units: splitUnits,
      splits,
      row_base: at.row_base,
      row_cap: at.row_cap,
      partial_stride: roundUp(matrix.n, matrix.order.rowBlock),
      range: RANGE_CODES[at.range],
      book_1: firstBlock(matrix, 1, block),
      book_2: firstBlock(matrix, 2, block),
    };
    const offset = this.#stride * this.#count++;
    this.#words.set(PARAM_WORDS.map((word) => params[word]), offset / 4);
    return { buffer: this.buffer, offset, size: PARAM_BYTES };
  }

  upload(gpu: Gpu): void {
    gpu.write(this.buffer, 0, this.#words);
  }
}

/** The row block of a binding block where a member of a stack begins. */
function firstBlock({ members, order }: Matrix, member: number, block: MatrixBlock): number {
  if (member >= members.length) return 0xffffffff;
  return Math.max(0, (members[member].start - block.start) / order.rowBlock);
}

/** A bind group; what is bound whole is bound up to the adapter's bound. */
export function bindGroup(
  gpu: Gpu,
  label: string,
  bindings: readonly BindingKind[],
  resources: readonly (GPUBuffer | GPUBufferBinding)[],
): GPUBindGroup {
  const bound = gpu.limits.maxStorageBufferBindingSize;
  return gpu.device.createBindGroup({
    label,
    layout: gpu.bindings(bindings),
    entries: resources.map((resource, binding) => {
      if ("buffer" in resource) return { binding, resource };
      const size = bindings[binding] === "uniform" ? STEP_BYTES : Math.min(resource.size, bound);
      return { binding, resource: { buffer: resource, size } };
    }),
  });
}
