/**
 * What the decode kernel of the `int8` family is generated from, and how its shape is chosen.
 *
 * @module
 */
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import { hasPackedDot } from "./code_words_wgsl.ts";
import { type CodeOrder, familyOrder, INT8_WORD_K } from "./order.ts";
import type { DecodeChoice } from "./variant.ts";
import type { Batch } from "./wgsl.ts";
import {
  type KernelRoom,
  lanesOf,
  MIN_LANES,
  SHARED_BYTES,
  shareThreads,
  SPLIT_BATCH,
  splitPositions,
  sumsBytes,
  turnPositions,
  wholeShape,
  type WorkgroupShare,
} from "./workgroup_share.ts";

/** One kernel. Nothing but format and order decides a bit of its result. */
export interface Int8Kernel extends WorkgroupShare {
  /** 8-bit codes of vectors of a multiple of 4. */
  format: CodeGemmFormat;
  /** Positions whose code words a thread has in registers: whole groups that divide every split. */
  turnPositions: number;
  /** Positions whose products are summed in integers. */
  groupPositions: number;
  /** Code words and scales are loaded a turn ahead, each over one that has been used. */
  prefetch: boolean;
  /** Turns of a split whose activations stand in workgroup memory at a time. */
  inputTurns: number;
  /** Fours of K whose centroids a thread gathers before it multiplies. */
  gatherQuads: number;
  /** How often each centroid stands in workgroup memory, a power of two. */
  copies: number;
  /** Activations come as integers; else the workgroup rounds them itself. */
  rounded: boolean;
  /** WGSL has packed dot products. */
  packed: boolean;
}

/** With 32 copies of 4-byte entries, a warp of an NVIDIA GPU reads without a bank conflict. */
const MAX_COPIES = 32;
/** With these, gathers for many rows take less than their products do. */
const FEW_COPIES = 8;
/** More would keep the registers of sums and of the code words ahead. */
const GATHER_QUADS = 4;
/** Rounds of activations for which copies are given up. */
const MOST_ROUNDS = 3;
/** Threads of a workgroup that takes a split, and K whose activations it holds. */
const SPLIT_THREADS = 128;
const SPLIT_LOCAL_K = 512;
/** Workgroups that take a split run two at a time at least. */
const SPLIT_BYTES = SHARED_BYTES / 2;

/** Workgroup memory of a kernel, bytes. */
export function int8Bytes(kernel: Int8Kernel): number {
  return tableBytes(kernel) * kernel.copies + inputBytes(kernel) * kernel.inputTurns +
    sumsBytes(kernel);
}

/** Bytes of the codebooks. */
function tableBytes({ format: { m, v } }: Int8Kernel): number {
  return m * 256 * v;
}

/** Bytes of a turn's activations, of all splits and rows: integers and scales. */
function inputBytes(
  { format: { v }, batch, splits, turnPositions, groupPositions }: Int8Kernel,
): number {
  return splits * batch * (turnPositions * v + turnPositions / groupPositions * 4);
}

/** Turns of a whole split. */
export function splitTurns(
  { order, turnPositions }: Pick<Int8Kernel, "order" | "turnPositions">,
): number {
  return splitPositions(order) / turnPositions;
}

/** The kernel of a batch on this adapter, or null where its workgroup memory is too little. */
export function int8Kernel(
  format: CodeGemmFormat,
  order: CodeOrder,
  batch: Batch,
  choice: DecodeChoice,
  room: KernelRoom,
): Int8Kernel | null {
  const int8Order = familyOrder(order, "int8");
  const { splits, groupPositions } = int8Order;
  const kernel = {
    format,
    order,
    batch,
    groupPositions,
    turnPositions: turnPositions(format, int8Order, choice.turnK ?? groupPositions * format.v),
    prefetch: choice.prefetch ?? true,
    gatherQuads: GATHER_QUADS,
    inputTurns: 1,
    copies: 1,
    packed: hasPackedDot(),
    sumRounds: 2 as const,
  };
  // A dispatch that rounds costs few rows more than rounding in each workgroup.
  if (batch < SPLIT_BATCH && splits * MIN_LANES <= room.maxThreads) {
    const whole = { ...kernel, ...wholeShape(order, choice, room), rounded: false };
    const most = { bytes: SHARED_BYTES, copies: MAX_COPIES, turns: splitTurns(whole) };
    const fitting = fit(whole, most, room);
    if (fitting !== null) return fitting;
  }
  const rowsPerThread = choice.codeRowsPerThread ?? 4;
  const threads = Math.min(choice.codeThreads ?? SPLIT_THREADS, room.maxThreads);
  const share = { splits: 1, rowsPerThread, lanes: lanesOf(room, rowsPerThread, threads) };
  const turns = Math.max(1, Math.floor(SPLIT_LOCAL_K / (kernel.turnPositions * format.v)));
  const most = { bytes: SPLIT_BYTES, copies: FEW_COPIES, turns };
  return fit({ ...kernel, ...share, rounded: true }, most, room);
}

/** The kernel with as many copies of its centroids, and turns' activations, as fit. */
function fit(
  kernel: Int8Kernel,
  most: { bytes: number; copies: number; turns: number },
  { workgroupBytes }: KernelRoom,
): Int8Kernel | null {
  const bytes = Math.min(workgroupBytes, most.bytes);
  for (let copies = most.copies; copies >= 1; copies /= 2) {
    const free = bytes - int8Bytes({ ...kernel, copies, inputTurns: 0 });
    const turns = Math.min(most.turns, Math.floor(free / inputBytes(kernel)));
    // Rather few copies than many rounds, in each of which all threads wait for the others.
    if (turns < 1 || (copies > 1 && turns < most.turns / MOST_ROUNDS)) continue;
    const rounds = Math.ceil(splitTurns(kernel) / turns);
    return { ...kernel, copies, inputTurns: Math.ceil(splitTurns(kernel) / rounds) };
  }
  return null;
}

/** Loads of 16 K of activations, and what of them each thread makes at a time. */
export function inputWords(kernel: Int8Kernel): { turn: number; all: number; perThread: number } {
  const { format: { v }, batch, splits, inputTurns, turnPositions } = kernel;
  const turn = turnPositions * v / INT8_WORD_K;
  const all = splits * inputTurns * batch * turn;
  return { turn, all, perThread: Math.ceil(all / shareThreads(kernel)) };
}
