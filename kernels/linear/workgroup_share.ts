/**
 * How workgroups of the decode kernels that gather centroids share out rows of N and splits of K, and
 * what decides it: of the dequantizing kernel, and of that of integers.
 *
 * @module
 */
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";
import type { CodeOrder, GroupOrder } from "./order.ts";
import { gcd, largestDivisor, lcm } from "./order.ts";
import type { DecodeChoice } from "./variant.ts";
import type { Batch } from "./wgsl.ts";

/** How the threads of a workgroup share out rows of N and splits of K. */
export interface WorkgroupShare {
  order: CodeOrder;
  /** Rows of the step that a workgroup takes. */
  batch: Batch;
  /** Splits of K that a workgroup takes, each with `lanes` threads. All of them: it has whole sums. */
  splits: number;
  /** Threads side by side along N. */
  lanes: number;
  /** Rows of N a thread holds: 4 or 8. */
  rowsPerThread: number;
  /** Rounds in which the sums of splits meet in workgroup memory: two take half of the memory. */
  sumRounds: 1 | 2;
}

/** From this batch on a thread has little else than sums in its registers: K is split instead. */
export const SPLIT_BATCH = 4;
/** Of the H200; WebGPU does not tell. */
const MULTIPROCESSORS = 132;
/** Threads along N of one split below which loads of code words are too short. */
export const MIN_LANES = 8;
/** No more splits than this come from many rows of N. */
const FEW_SPLITS = 8;
/**
 * Workgroup memory that an H200's multiprocessor has for all workgroups on it together under Vulkan,
 * as their number shows that run at once.
 */
export const SHARED_BYTES = 48 * 1024;

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
export function holdsWholeSums({ splits, order }: WorkgroupShare): boolean {
  return splits === order.dequantize.splits;
}

/**
 * Whether workgroups can finish whole sums: they have both columns of each pair, `half` apart, and
 * threads for every four pairs of all rows.
 */
export function holdsPairs(kernel: WorkgroupShare, half: number): boolean {
  const columns = shareColumns(kernel);
  return holdsWholeSums(kernel) && kernel.splits > 1 && columns % (2 * half) === 0 &&
    kernel.batch * columns / 8 <= shareThreads(kernel);
}

/** Threads of a workgroup. */
export function shareThreads(
  { splits, lanes }: Pick<WorkgroupShare, "splits" | "lanes">,
): number {
  return splits * lanes;
}

/** Rows of N of a workgroup. */
export function shareColumns({ lanes, rowsPerThread }: WorkgroupShare): number {
  return lanes * rowsPerThread;
}

/** Positions of a whole split. */
export function splitPositions(order: CodeOrder): number {
  return order.dequantize.splitUnits * order.dequantize.unitPositions;
}

/** Workgroup memory in which the sums of splits meet, bytes. */
export function sumsBytes(kernel: WorkgroupShare): number {
  const { splits } = kernel;
  return holdsWholeSums(kernel) && splits > 1
    ? splits * shareColumns(kernel) * 4 / kernel.sumRounds
    : 0;
}

/** All splits in one workgroup, and no more workgroups than a large GPU runs at once. */
export function wholeShape(order: CodeOrder, variant: DecodeChoice, room: KernelRoom) {
  const { splits } = order.dequantize;
  const rows = room.members.reduce((sum, n) => sum + n, 0);
  const rowsPerThread = variant.codeRowsPerThread ?? 4;
  // 448 threads, or twice as many, cut the N of Llama's gate and up evenly for 132 multiprocessors.
  const most = Math.floor(
    Math.min(variant.codeThreads ?? (splits <= FEW_SPLITS ? 448 : 512), room.maxThreads) / splits,
  );
  let lanes = Math.max(MIN_LANES, most - most % MIN_LANES);
  const fills = rows > lanes * rowsPerThread * MULTIPROCESSORS;
  if (variant.codeThreads === undefined && fills && 2 * lanes * splits <= room.maxThreads) {
    lanes *= 2;
  }
  return { splits, rowsPerThread, lanes: lanesOf(room, rowsPerThread, lanes) };
}

/**
 * A workgroup's rows of N belong to one matrix of a stack, which has one set of codebooks, wherever the
 * stack is cut into bindings.
 */
export function lanesOf(
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
export function turnPositions(
  format: CodeGemmFormat,
  { units, splitUnits, splits, unitPositions, groupPositions }: GroupOrder,
  wantedK: number,
): number {
  const last = units - (splits - 1) * splitUnits;
  const every = gcd(splitUnits, last) * unitPositions;
  const step = lcm(codesPerWord(format), groupPositions);
  return largestDivisor(every, Math.max(step, Math.floor(wantedK / format.v)), step);
}
