/**
 * Puts the weights of one matrix onto the GPU: read in slices, checked, tiled, and cut into row blocks
 * where a storage binding could not hold it.
 *
 * @module
 */
import { checkFormat, toFloat16 } from "../../shared/checkpoint/mod.ts";
import { FleetError, invariant } from "../../shared/errors.ts";
import type { CodeGemmFormat, DType, TensorInfo, TensorSource } from "../../shared/model_config.ts";
import { codesPerWord, DTYPE_BYTES, matrixFormat } from "../../shared/model_config.ts";
import { alignBytes, type Gpu } from "../gpu.ts";
import { denseStoredK, tileDenseRows, tileLines } from "./layout.ts";
import { int8Books } from "./int8.ts";
import { centroidExponent, timesPowerOfTwo } from "./magnitude.ts";
import type { Tuning } from "./order.ts";
import { canStack, codeOrder, DEFAULT_TUNING, denseOrder, roundUp } from "./order.ts";
import type { Matrix, MatrixBlock, MatrixShape } from "./types.ts";

/** Bytes of a checkpoint held at a time. */
const SLICE_BYTES = 4 * 1024 * 1024;
/** Written bytes after which we wait for the GPU, so that staging memory stays small. */
const FLUSH_BYTES = 64 * 1024 * 1024;

/** How to load, where the defaults do not do. */
export interface LoadOptions {
  /** The largest storage binding to make; the adapter's limit if that is less. */
  maxBindingBytes?: number;
  tuning?: Tuning;
}

/**
 * Loads a matrix: `NAME.codes`, `.codebooks` and `.scales` when the checkpoint is quantized and has
 * them, else the dense `NAME.weight` (a quantizer may leave matrices as they were).
 *
 * @param name `model.layers.0.self_attn.q_proj`, `lm_head`, `model.embed_tokens`
 * @param format the checkpoint's; null when it is not quantized
 * @throws FleetError `bad-checkpoint` naming the tensor that is missing, of the wrong shape or type,
 * NaN, infinite, or beyond float16
 * @throws FleetError `out-of-memory`
 */
export function loadMatrix(
  gpu: Gpu,
  tensors: TensorSource,
  name: string,
  shape: MatrixShape,
  format: CodeGemmFormat | null,
  options: LoadOptions = {},
): Promise<Matrix> {
  return format !== null && tensors.has(`${name}.codes`)
    ? loadStack(gpu, tensors, name, [{ name, n: shape[0] }], shape[1], format, options)
    : loadDense(gpu, tensors, name, shape, options);
}

async function loadDense(
  gpu: Gpu,
  tensors: TensorSource,
  name: string,
  shape: MatrixShape,
  options: LoadOptions,
): Promise<Matrix> {
  const [n, k] = shape;
  const info = expectTensor(tensors, `${name}.weight`, ["F16", "BF16", "F32"], [n, k]);
  const matrix = await allocateDense(gpu, name, shape, options);
  const { blocks, order: { rowBlock } } = matrix;
  const blockBytes = rowBlock * denseStoredK(k) * 2;
  await orDestroy(matrix, async () => {
    const writer = new Writer(gpu);
    const tile = new Uint16Array(blockBytes / 2);
    const rowBytes = k * DTYPE_BYTES[info.dtype];
    const sliceRows = Math.max(1, Math.floor(SLICE_BYTES / rowBytes));
    for (const block of blocks) {
      for (let at = 0; at < block.n; at += rowBlock) {
        const rows = Math.min(rowBlock, block.n - at);
        if (rows < rowBlock) tile.fill(0);
        for (let first = 0; first < rows; first += sliceRows) {
          const count = Math.min(sliceRows, rows - first);
          const row = block.start + at + first;
          const bytes = await tensors.read(info.name, row * rowBytes, count * rowBytes);
          const values = toFloat16(info.name, info.dtype, bytes, row * k);
          tileDenseRows(values, tile, { k, rows: count, first, rowBlock });
        }
        await writer.write(block.weights, (at / rowBlock) * blockBytes, tile);
      }
    }
  });
  return matrix;
}

/** A dense matrix, allocated and zero. */
export async function allocateDense(
  gpu: Gpu,
  name: string,
  shape: MatrixShape,
  options: LoadOptions = {},
): Promise<Matrix> {
  const [n, k] = shape;
  const order = denseOrder(shape, options.tuning ?? DEFAULT_TUNING);
  const blockBytes = order.rowBlock * denseStoredK(k) * 2;
  const blocks = await allocateBlocks(gpu, name, n, order.rowBlock, blockBytes, 0, options);
  const books = { codebooks: null, int8Codebooks: null };
  return makeMatrix(name, shape, null, order, blocks, books);
}

/** One matrix of a stack. */
export interface StackMember {
  /** `model.layers.0.self_attn.q_proj` */
  name: string;
  /** Rows of N. */
  n: number;
}

/** Whether {@linkcode loadStack} can make one matrix of these: all CodeGEMM, of fitting sizes. */
export function isStackable(
  tensors: TensorSource,
  members: readonly StackMember[],
  format: CodeGemmFormat | null,
): boolean {
  return format !== null && canStack(members.map(({ n }) => n)) &&
    members.every(({ name }) => tensors.has(`${name}.codes`));
}

/**
 * Loads matrices of one input as one matrix, their rows of N one after the other: one dispatch
 * then serves them all. Each keeps its own codebooks. Errors as for {@linkcode loadMatrix}.
 *
 * @param name for messages and GPU captures
 * @param members up to three that {@linkcode isStackable}
 */
export async function loadStack(
  gpu: Gpu,
  tensors: TensorSource,
  name: string,
  members: readonly StackMember[],
  k: number,
  format: CodeGemmFormat,
  options: LoadOptions = {},
): Promise<Matrix> {
  for (const member of members) checkFormat(format, member.name, [member.n, k]);
  const { m, v, g, b } = matrixFormat(format, k);
  const words = k / (codesPerWord(format) * v);
  const groups = k / g;
  const sources = members.map(({ name: of, n }) => ({
    n,
    codes: expectTensor(tensors, `${of}.codes`, ["I32"], [m, words, n]),
    books: expectTensor(tensors, `${of}.codebooks`, ["F16"], [m, 2 ** b, v]),
    scales: expectTensor(tensors, `${of}.scales`, ["F16"], [groups, n]),
  }));
  const matrix = await allocateCodes(gpu, name, members.map(({ n }) => n), k, format, options);
  const { blocks, order: { rowBlock } } = matrix;
  await orDestroy(matrix, async () => {
    const writer = new Writer(gpu);
    const codebooks = new Uint16Array(members.length * m * 2 ** b * v);
    for (const [i, { n, codes, books, scales }] of sources.entries()) {
      const { start } = matrix.members[i];
      const centroids = toFloat16(
        books.name,
        "F16",
        await tensors.read(books.name, 0, books.bytes),
      );
      const exponent = centroidExponent(centroids, m);
      const small = timesPowerOfTwo(books.name, centroids, -exponent);
      codebooks.set(small, i * small.length);
      const target = (buffers: GPUBuffer[]) => ({ blocks, buffers, start, n, rowBlock });
      await streamLines(writer, words, m, 4, target(blocks.map((block) => block.weights)), {
        read: async (plane, first, lines) => {
          const at = (plane * words + first) * n * 4;
          return asWords(await tensors.read(codes.name, at, lines * n * 4));
        },
        tile: (elements) => new Uint32Array(elements),
      });
      await streamLines(writer, groups, 1, 2, target(blocks.map((block) => block.scales!)), {
        read: async (_plane, first, lines) => {
          const bytes = await tensors.read(scales.name, first * n * 2, lines * n * 2);
          const values = toFloat16(scales.name, "F16", bytes, first * n);
          return timesPowerOfTwo(scales.name, values, exponent);
        },
        tile: (elements) => new Uint16Array(elements),
      });
    }
    await writer.write(matrix.codebooks!, 0, codebooks);
    if (matrix.int8Codebooks) {
      const centroids = new Float16Array(codebooks.buffer);
      await writer.write(matrix.int8Codebooks, 0, int8Books(centroids, members.length));
    }
  });
  return matrix;
}

/**
 * A CodeGEMM matrix of a checked format, allocated and zero.
 *
 * @param members rows of N of each matrix of a stack
 */
export async function allocateCodes(
  gpu: Gpu,
  name: string,
  members: readonly number[],
  k: number,
  format: CodeGemmFormat,
  options: LoadOptions = {},
): Promise<Matrix> {
  const ofMatrix = matrixFormat(format, k);
  const { m, v, g, b } = ofMatrix;
  const n = members.reduce((sum, rows) => sum + rows, 0);
  const order = codeOrder([n, k], format, options.tuning ?? DEFAULT_TUNING, members);
  const weightBytes = order.rowBlock * (k / (codesPerWord(format) * v)) * m * 4;
  const scaleBytes = order.rowBlock * (k / g) * 2;
  const blocks = await allocateBlocks(
    gpu,
    name,
    n,
    order.rowBlock,
    weightBytes,
    scaleBytes,
    options,
  );
  const bookBytes = members.length * m * 2 ** b * v * 2;
  const [codebooks, int8Codebooks] = await gpu.allocate(name, () => [
    gpu.storage(`${name}.codebooks`, bookBytes),
    order.int8Positions === null
      ? null
      : gpu.storage(`${name}.codebooks in int8`, bookBytes / 2 + 4 * members.length),
  ]);
  const books = { codebooks, int8Codebooks };
  return makeMatrix(name, [n, k], ofMatrix, order, blocks, books, members);
}

/** Rows of N `[start, start + n)` of a matrix's blocks; `start` begins a row block. */
interface BlockRows {
  blocks: readonly MatrixBlock[];
  /** Of each block, what is written. */
  buffers: readonly GPUBuffer[];
  start: number;
  n: number;
  rowBlock: number;
}

/**
 * Streams a tensor of `(planes, lines, N)` into row blocks of `[lines][planes][rowBlock]`, a few lines
 * of all planes at a time.
 */
async function streamLines<T extends Uint32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>>(
  writer: Writer,
  lines: number,
  planes: number,
  elementBytes: number,
  { blocks, buffers, start, n, rowBlock }: BlockRows,
  source: {
    read(plane: number, first: number, lines: number): Promise<T>;
    tile(elements: number): T;
  },
): Promise<void> {
  const sliceLines = Math.max(1, Math.floor(SLICE_BYTES / (planes * n * elementBytes)));
  for (let first = 0; first < lines; first += sliceLines) {
    const count = Math.min(sliceLines, lines - first);
    const slices: T[] = [];
    for (let plane = 0; plane < planes; plane++) {
      slices.push(await source.read(plane, first, count));
    }
    const stride = count * planes * rowBlock;
    for (const [i, block] of blocks.entries()) {
      // The rows that this block and the tensor have in common.
      const from = Math.max(start, block.start);
      const rows = Math.min(start + n, block.start + block.n) - from;
      if (rows <= 0) continue;
      const rowBlocks = Math.ceil(rows / rowBlock);
      const firstRowBlock = (from - block.start) / rowBlock;
      const out = source.tile(rowBlocks * stride);
      slices.forEach((slice, plane) =>
        tileLines(slice, out, {
          total: n,
          lines: count,
          from: from - start,
          rows,
          rowBlock,
          blockStride: stride,
          lineStride: planes * rowBlock,
          base: plane * rowBlock,
        })
      );
      for (let b = 0; b < rowBlocks; b++) {
        const at = (((firstRowBlock + b) * lines + first) * planes) * rowBlock * elementBytes;
        await writer.write(
          buffers[i],
          at,
          out.subarray(b * stride, (b + 1) * stride) as ArrayBufferView<ArrayBuffer>,
        );
      }
    }
  }
}

/** Writes to buffers, and waits now and then for the GPU to take what was written. */
class Writer {
  #pending = 0;

  constructor(readonly gpu: Gpu) {}

  async write(buffer: GPUBuffer, offset: number, data: ArrayBufferView<ArrayBuffer>) {
    this.gpu.write(buffer, offset, data);
    this.#pending += data.byteLength;
    if (this.#pending < FLUSH_BYTES) return;
    this.#pending = 0;
    this.gpu.device.queue.submit([]);
    await this.gpu.device.queue.onSubmittedWorkDone();
    this.gpu.check();
  }
}

/** Cuts N into blocks of whole row blocks that fit a binding, and allocates them. */
function allocateBlocks(
  gpu: Gpu,
  name: string,
  n: number,
  rowBlock: number,
  weightBytes: number,
  scaleBytes: number,
  options: LoadOptions,
): Promise<MatrixBlock[]> {
  const bound = Math.min(
    options.maxBindingBytes ?? Infinity,
    gpu.limits.maxStorageBufferBindingSize,
    gpu.limits.maxBufferSize,
  );
  const perBinding = Math.floor(bound / Math.max(weightBytes, scaleBytes));
  if (perBinding < 1) {
    throw new FleetError(
      "out-of-memory",
      `${name} needs storage bindings of ${Math.max(weightBytes, scaleBytes)} bytes; ` +
        `${gpu.info.name} offers ${bound}`,
    );
  }
  return gpu.allocate(name, () => {
    const blocks: MatrixBlock[] = [];
    for (let start = 0; start < n; start += perBinding * rowBlock) {
      const rows = Math.min(perBinding * rowBlock, n - start);
      const count = Math.ceil(rows / rowBlock);
      blocks.push({
        start,
        n: rows,
        weights: gpu.storage(`${name} weights from ${start}`, count * weightBytes),
        scales: scaleBytes === 0
          ? null
          : gpu.storage(`${name} scales from ${start}`, count * scaleBytes),
      });
    }
    return blocks;
  });
}

function makeMatrix(
  name: string,
  [n, k]: MatrixShape,
  format: CodeGemmFormat | null,
  order: Matrix["order"],
  blocks: MatrixBlock[],
  books: Pick<Matrix, "codebooks" | "int8Codebooks">,
  members: readonly number[] = [n],
): Matrix {
  const buffers = [
    ...blocks.flatMap((block) => [block.weights, block.scales]),
    ...Object.values(books),
  ].filter((buffer) => buffer !== null);
  return {
    name,
    n,
    k,
    format,
    order,
    blocks,
    members: members.map((rows, i) => ({
      start: members.slice(0, i).reduce((sum, before) => sum + before, 0),
      n: rows,
    })),
    ...books,
    bytes: buffers.reduce((sum, buffer) => sum + buffer.size, 0),
    destroy: () => buffers.forEach((buffer) => buffer.destroy()),
  };
}

async function orDestroy(matrix: Matrix, fill: () => Promise<void>): Promise<void> {
  try {
    await fill();
  } catch (error) {
    matrix.destroy();
    throw error;
  }
}

function expectTensor(
  tensors: TensorSource,
  name: string,
  dtypes: DType[],
  shape: number[],
): TensorInfo {
  const info = tensors.info(name);
  if (!dtypes.includes(info.dtype)) {
    throw new FleetError(
      "bad-checkpoint",
      `Tensor ${name} has type ${info.dtype}; it must be ${dtypes.join(" or ")}`,
    );
  }
  if (info.shape.join() !== shape.join()) {
    throw new FleetError(
      "bad-checkpoint",
      `Tensor ${name} has shape (${info.shape.join(", ")}); ` +
        `config.json makes it (${shape.join(", ")})`,
    );
  }
  invariant(
    info.bytes === shape.reduce((a, b) => a * b, DTYPE_BYTES[info.dtype]),
    `the source checked the size of ${name}`,
  );
  return info;
}

function asWords(bytes: Uint8Array<ArrayBuffer>): Uint32Array<ArrayBuffer> {
  const aligned = bytes.byteOffset % 4 === 0 ? bytes : bytes.slice();
  return new Uint32Array(aligned.buffer, aligned.byteOffset, aligned.byteLength / 4);
}

/** GPU bytes of a matrix, padding included: what {@linkcode loadMatrix} will allocate. */
export function matrixBytes(
  shape: MatrixShape,
  format: CodeGemmFormat | null,
  tuning: Tuning = DEFAULT_TUNING,
): number {
  const [n, k] = shape;
  if (format === null) {
    return roundUp(n, denseOrder(shape, tuning).rowBlock) * denseStoredK(k) * 2;
  }
  const rows = roundUp(n, codeOrder(shape, format, tuning).rowBlock);
  const { m, v, g, b } = matrixFormat(format, k);
  const rowBytes = k / v / codesPerWord(format) * m * 4 + k / g * 2;
  const { int8Positions } = codeOrder(shape, format, tuning);
  const int8Bytes = int8Positions === null ? 0 : alignBytes(m * 2 ** b * v + 4);
  return rows * rowBytes + m * 2 ** b * v * 2 + int8Bytes;
}
