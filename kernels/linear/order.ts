/**
 * The order in which a linear layer sums: part of the numerics profile. It follows from the shape of
 * the whole matrix, its format and the kernel family, and from nothing else: not from how many rows
 * run, not from the adapter's limits, not from how the matrix is cut into bindings. Two kernels of
 * one order give the same bits.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import { type CodeGemmFormat, codesPerWord, matrixFormat } from "../../shared/model_config.ts";
import type { NumericsProfile } from "../../shared/protocol.ts";
import type { MatrixShape } from "./types.ts";

/** Products that may be summed in float16 (DESIGN). */
export const FLOAT16_SUM = 16;
/** K whose activations share a scale as integers, at most. */
const INT8_GROUP_K = 64;
/** K of a load of such activations, 16 bytes. */
export const INT8_WORD_K = 16;
/** Of codebooks as integers: half of the workgroup memory that WebGPU guarantees. */
const INT8_BOOKS_BYTES = 8192;
/** K that a pair of float16 sums covers, one of the even K, one of the odd. */
export const FLOAT16_PAIR_K = 2 * FLOAT16_SUM;
const ROW_BLOCK_STEP = 256;
/** Matrices of a stack: q, k and v. */
const MAX_MEMBERS = 3;

/** What decides the order beside shape and format; a changed default is a new profile version. */
export interface Tuning {
  /** K of one unit where codes are dequantized; what is summed in float16 never straddles two. */
  unitK: number;
  /** Workgroups a decode dispatch of other kernels should have at one row, to fill a large GPU. */
  wantedWorkgroups: number;
  /** Rows of N in the largest row block, a multiple of 256. */
  maxRowBlock: number;
  /** From this many rows of N on there are fewer, taller row blocks. */
  wideN: number;
  wideWorkgroups: number;
  wideRowBlock: number;
  /** K of one unit of Psumbooks, and how many it should have: a turn of the kernel takes a unit. */
  psumbookUnitK: number;
  psumbookUnitBooks: number;
  /** Rows of N, each of a split of its own, whose sums a large GPU has under way at once. */
  psumbookRows: number;
  /** Beyond so many splits, or with less K in one, their partial sums cost more than they save. */
  psumbookSplits: number;
  psumbookMinSplitK: number;
  /** Splits of K for the dequantizing kernel: as many as a workgroup has threads for beside N. */
  dequantizeSplits: number;
  wideDequantizeSplits: number;
  /** K that a dense split has at least. */
  denseMinSplitK: number;
}

/** Rows of N of the tallest workgroup with Psumbooks: 1024 threads, four rows each. */
const TALLEST_WORKGROUP = 4096;
/** Rows of N past the last one that workgroups may have, as a part of all. */
const PADDING = 1 / 8;

/** The tuning of profile version 4. */
export const DEFAULT_TUNING: Tuning = {
  unitK: 64,
  wantedWorkgroups: 640,
  maxRowBlock: 1024,
  wideN: 16384,
  wideWorkgroups: 396,
  wideRowBlock: 2048,
  psumbookUnitK: 32,
  psumbookUnitBooks: 8,
  // Of an H200's 132 multiprocessors, each with one of the tallest workgroups.
  psumbookRows: 132 * TALLEST_WORKGROUP,
  psumbookSplits: 66,
  psumbookMinSplitK: 64,
  dequantizeSplits: 32,
  wideDequantizeSplits: 8,
  denseMinSplitK: 512,
};

/** Rows of N in a row block of a dense matrix. */
export const DENSE_ROW_BLOCK = 128;
/** K of a dense tile; weights are padded with zeros to multiples of {@linkcode DENSE_K_ALIGN}. */
export const DENSE_TILE_K = 256;
/** One 16-byte word: 8 float16 weights of one row. */
export const DENSE_OCTET = 8;
/** Four octets, so that the kernel's inner loop has no tail. */
export const DENSE_K_ALIGN = 32;

/** How partial sums over K are made and put together. */
export interface SplitOrder {
  /** Rows of N that a workgroup covers. */
  rowBlock: number;
  /** Units of K of the whole matrix, and of one split (the last may be shorter). */
  units: number;
  splitUnits: number;
  /** Partial sums per output; 1 is stored at once. */
  splits: number;
  /** The splits are summed in this many runs, then the runs. */
  slices: number;
}

/** How a kernel family sums the codes of a split. */
export interface GroupOrder extends SplitOrder {
  /** Positions of a unit: whole code words, whole groups. */
  unitPositions: number;
  /**
   * Positions summed in float16 before they are scaled and added in float32; where codes are
   * dequantized, those of even and of odd K apart, put together in float32.
   */
  groupPositions: number;
}

/** The order of a CodeGEMM matrix; a position is `v` consecutive weights. */
export interface CodeOrder extends GroupOrder {
  kind: "code";
  /** For decode rows that are dequantized, in place of this order's own. */
  dequantize: GroupOrder;
  /**
   * Positions whose products are summed in integers, before they are scaled and added in float32; the
   * splits are those of `dequantize`. Null where integers are not for these codes.
   */
  int8Positions: number | null;
  /** Positions that share a scale: `g / v`. */
  scalePositions: number;
}

/** The order of a dense matrix; a unit is {@linkcode DENSE_TILE_K} of K. */
export interface DenseOrder extends SplitOrder {
  kind: "dense";
}

/** Whether these matrices of N rows each can stand in one stack: row blocks must not straddle two. */
export function canStack(members: readonly number[]): boolean {
  return members.length <= MAX_MEMBERS && members.reduce(gcd) % ROW_BLOCK_STEP === 0;
}

/**
 * The order of a CodeGEMM matrix of a checked format.
 *
 * @param members rows of N of each matrix of a stack ({@linkcode canStack}), together N
 */
export function codeOrder(
  [n, k]: MatrixShape,
  format: CodeGemmFormat,
  tuning: Tuning = DEFAULT_TUNING,
  members: readonly number[] = [n],
): CodeOrder {
  const { m, v, g } = matrixFormat(format, k);
  const positions = k / v;
  const scalePositions = g / v;
  const perWord = codesPerWord(format);
  const wholeUnit = largestDivisor(
    positions,
    Math.max(perWord, Math.floor(tuning.unitK / v)),
    perWord,
  );
  const groupPositions = (mostK: number) =>
    largestDivisor(gcd(wholeUnit, scalePositions), Math.max(1, Math.floor(mostK / v)), 1);
  const wide = n >= tuning.wideN;
  const maxRowBlock = wide ? tuning.wideRowBlock : tuning.maxRowBlock;
  const blocks = Math.ceil(n / maxRowBlock);
  const rowBlock = members.length === 1
    ? roundUp(Math.ceil(n / blocks), ROW_BLOCK_STEP)
    : largestDivisor(members.reduce(gcd), maxRowBlock, ROW_BLOCK_STEP);
  const wholeUnits = positions / wholeUnit;
  const pairs = {
    rowBlock,
    unitPositions: wholeUnit,
    groupPositions: groupPositions(FLOAT16_PAIR_K),
  };
  if (format.b > 8) {
    // Wide codes are gathered from memory: what counts there is the number of workgroups.
    const wanted = wide ? tuning.wideWorkgroups : tuning.wantedWorkgroups;
    const wideCodes = { ...pairs, ...splitUnits(wholeUnits, Math.ceil(n / rowBlock), 1, wanted) };
    return {
      kind: "code",
      scalePositions,
      ...wideCodes,
      dequantize: wideCodes,
      int8Positions: null,
    };
  }
  const step = lcm(perWord, groupPositions(FLOAT16_SUM));
  const unitPositions = largestDivisor(
    wholeUnit,
    Math.max(
      step,
      Math.floor(tuning.psumbookUnitK / v),
      Math.ceil(tuning.psumbookUnitBooks / m),
    ),
    step,
  );
  const dequantizeSplits = wide ? tuning.wideDequantizeSplits : tuning.dequantizeSplits;
  return {
    kind: "code",
    rowBlock,
    scalePositions,
    unitPositions,
    groupPositions: groupPositions(FLOAT16_SUM),
    ...psumbookSplits(n, positions / unitPositions, unitPositions * v, tuning, members),
    dequantize: { ...pairs, ...evenSplits(wholeUnits, dequantizeSplits) },
    int8Positions: int8Positions({ m, v }, gcd(wholeUnit, scalePositions)),
  };
}

/**
 * The most rows of N that a workgroup with Psumbooks takes: a power of two, so that few are past the
 * last one and, in a stack, none are of two matrices. The Psumbooks of many rows cost each little.
 */
export function psumbookColumns(members: readonly number[]): number {
  const n = members.reduce((sum, rows) => sum + rows, 0);
  const fits = (rows: number) =>
    members.length > 1
      ? members.every((member) => member % rows === 0)
      : roundUp(n, rows) <= n * (1 + PADDING);
  let rows = TALLEST_WORKGROUP;
  while (rows > ROW_BLOCK_STEP && !fits(rows)) rows /= 2;
  return rows;
}

/**
 * As many splits as give every multiprocessor of a large GPU its workgroup, and none a second one: with
 * one more, all would wait for it.
 */
function psumbookSplits(
  n: number,
  units: number,
  unitK: number,
  tuning: Tuning,
  members: readonly number[],
) {
  const atOnce = Math.floor(tuning.psumbookRows / roundUp(n, psumbookColumns(members)));
  const wanted = Math.max(1, Math.min(tuning.psumbookSplits, atOnce));
  const least = Math.min(units, Math.ceil(tuning.psumbookMinSplitK / unitK));
  return splitBy(units, Math.max(least, Math.ceil(units / wanted)));
}

/** Groups of whole words of activations, of codebooks that any workgroup holds. */
function int8Positions({ m, v }: { m: number; v: number }, most: number): number | null {
  if (v % 4 !== 0 || m * 256 * v > INT8_BOOKS_BYTES) return null;
  for (let positions = most; positions >= 1; positions--) {
    const k = positions * v;
    if (most % positions === 0 && k <= INT8_GROUP_K && k % INT8_WORD_K === 0) return positions;
  }
  return null;
}

/** K whose activations share a scale as integers. */
export function int8GroupK(
  { format, order }: { format: CodeGemmFormat | null; order: CodeOrder | DenseOrder },
): number {
  invariant(
    format !== null && order.kind === "code" && order.int8Positions !== null,
    "integers are for these codes",
  );
  return order.int8Positions * format.v;
}

/** How a kernel family sums the codes of a matrix. */
export function familyOrder(order: CodeOrder, family: NumericsProfile["decode"]): GroupOrder {
  switch (family) {
    case "codegemm":
      return order;
    case "dequantize":
      return order.dequantize;
    case "int8":
      invariant(order.int8Positions !== null, "the family suits the codes");
      return { ...order.dequantize, groupPositions: order.int8Positions };
  }
}

/** The splits that a kernel family makes of K. */
export function decodeSplits(
  order: CodeOrder | DenseOrder,
  family: NumericsProfile["decode"] | "dense",
): SplitOrder {
  return order.kind === "code" && family !== "dense" ? familyOrder(order, family) : order;
}

/** The order of a dense matrix. */
export function denseOrder([n, k]: MatrixShape, tuning: Tuning = DEFAULT_TUNING): DenseOrder {
  return {
    kind: "dense",
    rowBlock: DENSE_ROW_BLOCK,
    ...splitUnits(
      Math.ceil(k / DENSE_TILE_K),
      Math.ceil(n / DENSE_ROW_BLOCK),
      Math.ceil(tuning.denseMinSplitK / DENSE_TILE_K),
      tuning.wantedWorkgroups,
    ),
  };
}

function splitUnits(units: number, rowBlocks: number, minUnits: number, workgroups: number) {
  const wanted = Math.max(1, Math.ceil(workgroups / rowBlocks));
  return splitBy(units, Math.min(units, Math.max(minUnits, Math.ceil(units / wanted))));
}

/** Splits of an even number of units where that is possible: then a turn can take two at once. */
function evenSplits(units: number, wanted: number) {
  const perSplit = Math.ceil(units / wanted);
  return splitBy(units, perSplit > 1 ? roundUp(perSplit, 2) : 1);
}

function splitBy(units: number, perSplit: number) {
  const splits = Math.ceil(units / perSplit);
  return { units, splitUnits: perSplit, splits, slices: splits > 16 ? 8 : 1 };
}

/** The largest divisor of `value` that is at most `bound` and a multiple of `step`. */
export function largestDivisor(value: number, bound: number, step: number): number {
  for (let d = bound - bound % step; d >= step; d -= step) if (value % d === 0) return d;
  invariant(false, `${step} divides ${value}`);
}

/** The greatest common divisor. */
export function gcd(a: number, b: number): number {
  return b === 0 ? a : gcd(b, a % b);
}

/** The least common multiple. */
export function lcm(a: number, b: number): number {
  return a / gcd(a, b) * b;
}

/** `value` rounded up to a multiple of `step`. */
export function roundUp(value: number, step: number): number {
  return Math.ceil(value / step) * step;
}
