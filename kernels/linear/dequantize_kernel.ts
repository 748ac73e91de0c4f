/**
 * What the dequantizing decode kernel of 8-bit codes is generated from, and how its shape is chosen.
 *
 * @module
 */
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";
import { hasPackedDot } from "./code_words_wgsl.ts";
import type { CodeOrder } from "./order.ts";
import { gcd, largestDivisor, lcm } from "./order.ts";
import type { DecodeChoice, Variant } from "./variant.ts";
import type { Batch } from "./wgsl.ts";

/** One kernel. Nothing but format and order decides a bit of its result. */
export interface DequantizeKernel {
  /** 8-bit codes of vectors of a multiple of 4. */
  format: CodeGemmFormat;
  order: CodeOrder;
  /** Rows of the step that a workgroup takes. */
  batch: Batch;
  /** Splits of K that a workgroup takes, each with `lanes` threads. All of them: it has whole sums. */
  splits: number;
  /** Threads side by side along N. */
  lanes: number;
  /** Rows of N a thread holds: 4 or 8. */
  rowsPerThread: number;
  /** Positions whose code words a thread has in registers: they divide every split. */
  turnPositions: number;
  /** Code words are loaded a turn ahead: less waiting, more registers. */
  prefetch: boolean;
  /** The activations of the workgroup's splits stand in workgroup memory. */
  localInput: boolean;
  /** How often each centroid stands in workgroup memory, a power of two. */
  copies: number;
  /** WGSL has packed dot products. */
  packed: boolean;
}

/** With 16 copies of 8-byte entries, half a warp of an NVIDIA GPU reads without a bank conflict. */
const MAX_COPIES = 16;
/** Fewer than that cost more than activations in workgroup memory gain. */
const ENOUGH_COPIES = 4;
/** From this batch on a thread has little else than sums in its registers: K is split instead. */
const SPLIT_BATCH = 4;
/** K whose activations a workgroup holds at a time, of batches that split K. */
const LOCAL_K = 1024;
/** Fewer splits than this come from many rows of N: then a thread can hold more of them. */
const FEW_SPLITS = 8;
/** Of the GPU that the shapes are made for; WebGPU does not tell. */
const MULTIPROCESSORS = 132;
/** N from which on they fill a large GPU even so. */
const TALL_N = 50_000;
/** Threads along N of one split below which loads of code words are too short. */
const MIN_LANES = 8;

/** What limits a kernel's shape. */
export interface KernelRoom {
  /** Rows of N of the matrices of a stack. */
  members: readonly number[];
  /** Rows of N of a binding block; workgroups are counted from its first one. */
  bindingRows: number;
  maxThreads: number;
  workgroupBytes: number;
}

/** Whether a workgroup has whole sums, so that no partial sums go to memory. */
export function holdsWholeSums({ splits, order }: DequantizeKernel): boolean {
  return splits === order.dequantize.splits;
}

/** Threads of a workgroup. */
export function dequantizeThreads({ splits, lanes }: DequantizeKernel): number {
  return splits * lanes;
}

/** Rows of N of a workgroup. */
export function dequantizeColumns({ lanes, rowsPerThread }: DequantizeKernel): number {
  return lanes * rowsPerThread;
}

/** Positions of a whole split. */
export function splitPositions(order: CodeOrder): number {
  return order.dequantize.splitUnits * order.unitPositions;
}

/** Workgroup memory of a kernel, bytes. */
export function dequantizeBytes(kernel: DequantizeKernel): number {
  const { format: { m, v }, order, batch, splits, copies, localInput } = kernel;
  const tables = m * 256 * v * 2 * copies;
  const input = localInput ? splits * splitPositions(order) * v * 2 * batch : 0;
  const sums = holdsWholeSums(kernel) && splits > 1 ? splits * dequantizeColumns(kernel) * 4 : 0;
  return tables + input + sums;
}

/**
 * The kernel of a batch on this adapter, or null where another must do: codes of more than 8 bits,
 * vectors of another length, tables that do not fit.
 */
export function dequantizeKernel(
  format: CodeGemmFormat,
  order: CodeOrder,
  batch: Batch,
  variant: Pick<Variant, "unroll"> & DecodeChoice,
  room: KernelRoom,
): DequantizeKernel | null {
  if (!variant.unroll || format.b !== 8 || format.v % 4 !== 0) return null;
  const { splits } = order.dequantize;
  const whole = batch < SPLIT_BATCH && splits * MIN_LANES <= room.maxThreads;
  const shape = whole
    ? wholeShape(order, variant, room)
    : splitShape(format, order, batch, variant, room);
  const turnK = variant.turnK ?? (batch === 2 ? 64 : 32);
  const kernel: DequantizeKernel = {
    format,
    order,
    batch,
    ...shape,
    turnPositions: turnPositions(format, order, turnK),
    prefetch: variant.prefetch ?? !whole,
    localInput: !whole,
    copies: MAX_COPIES,
    packed: hasPackedDot(),
  };
  const fitting = fit(kernel, room);
  if (fitting !== null && fitting.copies >= ENOUGH_COPIES) return fitting;
  return fit({ ...kernel, localInput: false }, room) ?? fitting;
}

/** All splits in one workgroup, and no more workgroups than a large GPU runs at once. */
function wholeShape(order: CodeOrder, variant: DecodeChoice, room: KernelRoom) {
  const { splits } = order.dequantize;
  const rows = room.members.reduce((sum, n) => sum + n, 0);
  const few = splits <= FEW_SPLITS;
  const rowsPerThread = variant.codeRowsPerThread ?? (few && rows >= TALL_N ? 8 : 4);
  // 448 threads cut the N of Llama's gate and up evenly for 132 multiprocessors.
  const most = Math.floor(
    Math.min(variant.codeThreads ?? (few ? 448 : 512), room.maxThreads) / splits,
  );
  let lanes = Math.max(MIN_LANES, most - most % MIN_LANES);
  const fills = rows > lanes * rowsPerThread * MULTIPROCESSORS;
  if (variant.codeThreads === undefined && fills && 2 * lanes * splits <= room.maxThreads) {
    lanes *= 2;
  }
  return { splits, rowsPerThread, lanes: lanesOf(room, rowsPerThread, lanes) };
}

/** As many splits as their activations allow. */
function splitShape(
  format: CodeGemmFormat,
  order: CodeOrder,
  batch: Batch,
  variant: DecodeChoice,
  room: KernelRoom,
) {
  const threads = Math.min(variant.codeThreads ?? (batch === 8 ? 256 : 512), room.maxThreads);
  const most = Math.max(1, Math.floor(LOCAL_K / (splitPositions(order) * format.v)));
  const splits = largestDivisor(order.dequantize.splits, most, 1);
  const rowsPerThread = variant.codeRowsPerThread ?? 4;
  const lanes = lanesOf(room, rowsPerThread, Math.floor(threads / splits));
  return { splits, rowsPerThread, lanes };
}

/**
 * A workgroup's rows of N belong to one matrix of a stack, which has one set of codebooks, wherever the
 * stack is cut into bindings.
 */
function lanesOf(
  { members, bindingRows }: KernelRoom,
  rowsPerThread: number,
  wanted: number,
): number {
  if (members.length > 1) {
    return largestDivisor(gcd(members.reduce(gcd), bindingRows) / rowsPerThread, wanted, 1);
  }
  return Math.min(wanted, Math.ceil(members[0] / rowsPerThread));
}

/** The largest number of positions within `wantedK` of K that divides every split. */
function turnPositions(format: CodeGemmFormat, order: CodeOrder, wantedK: number): number {
  const { units, splitUnits, splits } = order.dequantize;
  const last = units - (splits - 1) * splitUnits;
  const every = gcd(splitUnits, last) * order.unitPositions;
  const step = lcm(codesPerWord(format), order.groupPositions);
  return largestDivisor(every, Math.max(step, Math.floor(wantedK / format.v)), step);
}

/** The kernel with as many copies of its centroids as fit. */
function fit(kernel: DequantizeKernel, { workgroupBytes }: KernelRoom): DequantizeKernel | null {
  for (let copies = kernel.copies; copies >= 1; copies /= 2) {
    const fitting = { ...kernel, copies };
    if (dequantizeBytes(fitting) <= workgroupBytes) return fitting;
  }
  return null;
}
