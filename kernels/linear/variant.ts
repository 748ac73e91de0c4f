/**
 * What may be tuned without changing a bit of the result, beside what the order of sums fixes.
 *
 * @module
 */
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import type { NumericsProfile } from "../../shared/protocol.ts";
import { type CodeOrder, type DenseOrder, largestDivisor } from "./order.ts";
import type { PrefillTile } from "./prefill_tile.ts";
import { type Batch, BATCHES } from "./wgsl.ts";

/** The shape of a CodeGEMM decode kernel; what is left out suits family and batch. */
export interface DecodeChoice {
  /**
   * K that a CodeGEMM decode kernel takes at a turn. Compilers that reassociate sums (Mesa's do) may
   * round straight code of another length differently: autotuning compares the bits.
   *
   * By default 64, what suits the batch where codes are dequantized, a group of integers, and all of a
   * unit where Psumbooks are made.
   */
  turnK?: number;
  /** Rows of N that a thread of a CodeGEMM decode kernel holds; by default what suits the matrix. */
  codeRowsPerThread?: 4 | 8;
  /** Most threads of a workgroup. */
  codeThreads?: number;
  /** CodeGEMM decode kernels load their code words a turn ahead; by default where it pays. */
  prefetch?: boolean;
}

/** A choice of kernel shapes for one linear layer. */
export interface Variant {
  /**
   * Rows that a decode workgroup takes at once, rising: a step takes one of them, repeatedly where it
   * has more rows ({@linkcode kernelFor}). Those that do not fit into workgroup memory are left out.
   */
  batches: readonly Batch[];
  /** Decode kernels of CodeGEMM matrices: all of them, and those of one batch beside or instead. */
  decode?: DecodeChoice;
  byBatch?: Readonly<Partial<Record<Batch, DecodeChoice>>>;
  /**
   * Straight code in place of loops: faster on a GPU, many seconds to compile for a CPU. Decode kernels
   * of integers are straight either way.
   */
  unroll: boolean;
  /** Rows of N that a thread of a dense decode kernel holds, at least; of many rows it holds two. */
  denseRowsPerThread: 1 | 2 | 4;
  /** By rising rows: a step takes the first tile that is for as many rows as it has, else the last. */
  prefillTiles: readonly PrefillTile[];
}

/** What a variant says of one batch. */
export function choiceOf({ decode, byBatch }: Variant, batch: Batch): DecodeChoice {
  return { ...decode, ...byBatch?.[batch] };
}

/**
 * The kernel for so many rows: the smallest that takes them at once. Else, of the largest and those half
 * as large, the one that computes the fewest rows that are not there; the larger of equals.
 *
 * @param kernels by rising batch, at least one
 */
export function kernelFor<K extends { batch: Batch }>(kernels: readonly K[], rows: number): K {
  const atOnce = kernels.find(({ batch }) => batch >= rows);
  if (atOnce) return atOnce;
  const largest = kernels.at(-1)!;
  const computed = ({ batch }: K) => Math.ceil(rows / batch) * batch;
  return kernels.filter(({ batch }) => 2 * batch >= largest.batch)
    .reduce((best, kernel) => computed(kernel) <= computed(best) ? kernel : best);
}

/** The variant of an adapter until autotuning says better. */
export function defaultVariant(software: boolean): Variant {
  return {
    batches: software ? [1, 4] : BATCHES,
    denseRowsPerThread: software ? 4 : 1,
    unroll: !software,
    prefillTiles: software
      ? [
        { rows: 8, columns: 64, patchRows: 8, patchColumns: 4 },
        { rows: 64, columns: 64, patchRows: 8, patchColumns: 4 },
      ]
      : [
        { rows: 16, columns: 64, patchRows: 4, patchColumns: 2 },
        { rows: 32, columns: 128, patchRows: 4, patchColumns: 4 },
        { rows: 64, columns: 128, patchRows: 8, patchColumns: 8 },
      ],
  };
}

/**
 * The kernel family of a matrix's decode rows. Codes of more than 8 bits always dequantize: they have
 * more centroids than there are rows of N to use their Psumbooks, and none fits workgroup memory. In
 * place of `int8` so do codes whose groups do not fill words of integers, or whose codebooks are large.
 */
export function decodeFamily(
  { format, order }: { format: CodeGemmFormat | null; order: CodeOrder | DenseOrder },
  { decode }: Pick<NumericsProfile, "decode">,
): NumericsProfile["decode"] | "dense" {
  if (format === null || order.kind === "dense") return "dense";
  if (format.b > 8) return "dequantize";
  return decode === "int8" && order.int8Positions === null ? "dequantize" : decode;
}

/** Rows of a step from which on a CodeGEMM Psumbook takes more registers than it saves work. */
const MAX_PSUMBOOK_BATCH = 4;

/** The batches of a decode kernel of this family. */
export function familyBatches(
  { batches }: Variant,
  family: NumericsProfile["decode"] | "dense",
): Batch[] {
  return batches.filter((batch) => family !== "codegemm" || batch <= MAX_PSUMBOOK_BATCH);
}

/**
 * Threads of a decode workgroup of wide codes, or on a software adapter, and the rows of N that each
 * holds; both together divide the row block. Dequantizing kernels hold fewer: a pair of chains for
 * each.
 */
export function codeThreads(
  order: CodeOrder,
  family: NumericsProfile["decode"],
  batch: Batch,
  variant: DecodeChoice,
  maxThreads: number,
): { threads: number; perThread: number } {
  const tall = family === "codegemm" && order.rowBlock >= 1024;
  const perThread = variant.codeRowsPerThread ?? (tall ? 8 : 4);
  const wanted = variant.codeThreads ?? (family === "codegemm" || batch === 8 ? 256 : 512);
  const threads = largestDivisor(order.rowBlock / perThread, Math.min(wanted, maxThreads), 1);
  return { threads, perThread };
}
