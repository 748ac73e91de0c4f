/**
 * What the dequantizing decode kernel of 8-bit codes is generated from, and how its shape is chosen.
 *
 * @module
 */
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import { hasPackedDot } from "./code_words_wgsl.ts";
import { type CodeOrder, FLOAT16_PAIR_K, largestDivisor, roundUp } from "./order.ts";
import type { DecodeChoice, Variant } from "./variant.ts";
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
export interface DequantizeKernel extends WorkgroupShare {
  /** 8-bit codes of vectors of a multiple of 4. */
  format: CodeGemmFormat;
  /** Positions whose code words a thread has in registers: they divide every split. */
  turnPositions: number;
  /**
   * Code words are loaded a turn ahead, for less waiting: all at its beginning, which takes registers
   * for two turns; or, with their scales, each over one whose codes have been used.
   */
  prefetch: "none" | "all" | "over";
  /** Turns of a split whose activations stand in workgroup memory at a time; 0: none ever do. */
  inputTurns: number;
  /**
   * Fours of K whose centroids a thread gathers before it multiplies: registers beside its sums. With
   * fewer than are summed in float16, those sums stay in registers from one gather to the next.
   */
  gatherQuads: number;
  /** How often each centroid stands in workgroup memory, a power of two. */
  copies: number;
  /** WGSL has packed dot products. */
  packed: boolean;
}

/** With 16 copies of 8-byte entries, half a warp of an NVIDIA GPU reads without a bank conflict. */
const MAX_COPIES = 16;
/** With these, gathers take about as long as the products of eight rows do. */
const FEW_COPIES = 4;
/** From this batch on what counts is products: threads are many, and gathers may take longer. */
const TALL_BATCH = 8;
/** From this batch on float32 sums leave registers neither for float16 ones nor for a turn ahead. */
const MANY_SUMS_BATCH = 16;
/** K whose activations a workgroup holds at a time, of batches that split K; and of tall ones. */
const LOCAL_K = 1024;
const TALL_LOCAL_K = 128;
/** Threads that a multiprocessor should have, 16 warps: more do not find registers. */
const SHARED_THREADS = 512;
/** Four schedulers of 32 lanes each. */
const THREAD_STEP = 128;
/** Workgroup memory of a kernel, bytes. */
export function dequantizeBytes(kernel: DequantizeKernel): number {
  const { format: { m, v }, batch, splits, copies, turnPositions, inputTurns } = kernel;
  const tables = m * 256 * v * 2 * copies;
  const input = splits * inputTurns * turnPositions * v * 2 * batch;
  return tables + input + sumsBytes(kernel);
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
  const turnK = variant.turnK ?? (batch < SPLIT_BATCH ? 64 : FLOAT16_PAIR_K);
  const base = {
    format,
    order,
    batch,
    turnPositions: turnPositions(format, order.dequantize, turnK),
    gatherQuads: batch < MANY_SUMS_BATCH ? 4 : FLOAT16_PAIR_K / 4,
    packed: hasPackedDot(),
    sumRounds: 1 as const,
  };
  if (whole) {
    const shape = wholeShape(order, variant, room);
    const ahead = variant.prefetch ?? shareThreads(shape) <= SHARED_THREADS;
    const prefetch = ahead ? "over" as const : "none" as const;
    return fit({ ...base, ...shape, prefetch, inputTurns: 0, copies: MAX_COPIES }, room);
  }
  const ahead = variant.prefetch ?? batch < MANY_SUMS_BATCH;
  const prefetch = ahead ? "all" as const : "none" as const;
  const kernel = { ...base, ...splitShape(base, variant, room), prefetch };
  return fit(kernel, room) ?? fit({ ...kernel, inputTurns: 0 }, room);
}

/** Splits of K shared out among workgroups, and the activations of some turns in each. */
function splitShape(
  { format, order, batch, turnPositions }: Pick<
    DequantizeKernel,
    "format" | "order" | "batch" | "turnPositions"
  >,
  variant: DecodeChoice,
  room: KernelRoom,
) {
  const tall = batch >= TALL_BATCH;
  const rowsPerThread = variant.codeRowsPerThread ?? 4;
  const turnK = turnPositions * format.v;
  const splitK = splitPositions(order) * format.v;
  const most = Math.max(1, Math.floor(LOCAL_K / splitK));
  const splits = tall ? 1 : largestDivisor(order.dequantize.splits, most, 1);
  const inputTurns = Math.max(
    1,
    Math.floor(Math.min(splitK, tall ? TALL_LOCAL_K : LOCAL_K) / turnK),
  );
  const copies = tall ? FEW_COPIES : MAX_COPIES;
  const bytes = format.m * 256 * format.v * 2 * copies + inputTurns * turnK * 2 * batch;
  const atOnce = tall ? Math.max(1, Math.floor(SHARED_BYTES / bytes)) : 1;
  const wanted = roundUp(Math.ceil(SHARED_THREADS / atOnce), THREAD_STEP);
  const threads = Math.min(variant.codeThreads ?? wanted, room.maxThreads);
  const lanes = lanesOf(room, rowsPerThread, Math.max(1, Math.floor(threads / splits)));
  return { splits, rowsPerThread, lanes, inputTurns, copies };
}

/** The kernel with as many copies of its centroids as fit. */
function fit(kernel: DequantizeKernel, { workgroupBytes }: KernelRoom): DequantizeKernel | null {
  for (let copies = kernel.copies; copies >= 1; copies /= 2) {
    const fitting = { ...kernel, copies };
    if (dequantizeBytes(fitting) <= workgroupBytes) return fitting;
  }
  return null;
}
