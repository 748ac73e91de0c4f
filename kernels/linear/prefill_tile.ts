/**
 * The tiles of prefill kernels: how a workgroup's outputs are shared out among its threads, how K is
 * cut, and what lies where in workgroup memory.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";
import { centroidCount } from "./code_words_wgsl.ts";
import type { CodeOrder } from "./order.ts";
import { DENSE_K_ALIGN, FLOAT16_SUM, INT8_WORD_K, largestDivisor, lcm, roundUp } from "./order.ts";
import type { MatrixShape } from "./types.ts";

/** The tile of outputs of a workgroup. None of this changes a bit of the result. */
export interface PrefillTile {
  /** Rows of the step, and rows of N, that a workgroup computes: powers of two. */
  rows: number;
  columns: number;
  /** Rows and columns of one thread's patch: powers of two. */
  patchRows: number;
  patchColumns: number;
  /** K of a CodeGEMM tile, about; by default 32, of integers 64. */
  depth?: number;
  /** How often a codebook stands in workgroup memory at most, where there is room; by default 4. */
  copies?: number;
  /** Tiles in workgroup memory: with 2, one is filled while others still compute; by default 1. */
  buffers?: 1 | 2;
  /** Rows of the largest step that it is for; by default its own. */
  upTo?: number;
}

/** Tiles worth trying on a GPU: patches by how many threads hold them, few rows and many. */
export const PREFILL_TILES: readonly PrefillTile[] = [
  { rows: 8, columns: 128, patchRows: 4, patchColumns: 2 },
  { rows: 8, columns: 256, patchRows: 4, patchColumns: 4 },
  { rows: 8, columns: 128, patchRows: 8, patchColumns: 1, depth: 64 },
  { rows: 16, columns: 64, patchRows: 4, patchColumns: 2 },
  { rows: 16, columns: 128, patchRows: 4, patchColumns: 2 },
  { rows: 16, columns: 128, patchRows: 4, patchColumns: 4 },
  { rows: 16, columns: 256, patchRows: 4, patchColumns: 4 },
  { rows: 16, columns: 128, patchRows: 8, patchColumns: 2 },
  { rows: 32, columns: 64, patchRows: 4, patchColumns: 4 },
  { rows: 32, columns: 128, patchRows: 4, patchColumns: 4 },
  { rows: 32, columns: 128, patchRows: 4, patchColumns: 4, buffers: 2 },
  { rows: 32, columns: 128, patchRows: 4, patchColumns: 4, depth: 64 },
  { rows: 32, columns: 128, patchRows: 8, patchColumns: 4 },
  { rows: 32, columns: 128, patchRows: 8, patchColumns: 4, buffers: 2 },
  { rows: 32, columns: 256, patchRows: 8, patchColumns: 4, buffers: 2 },
  { rows: 32, columns: 256, patchRows: 4, patchColumns: 8, buffers: 2 },
  { rows: 64, columns: 64, patchRows: 4, patchColumns: 4, buffers: 2 },
  { rows: 64, columns: 64, patchRows: 8, patchColumns: 4, buffers: 2 },
  { rows: 64, columns: 128, patchRows: 4, patchColumns: 4 },
  { rows: 64, columns: 128, patchRows: 8, patchColumns: 4 },
  { rows: 64, columns: 128, patchRows: 8, patchColumns: 4, buffers: 2 },
  { rows: 64, columns: 128, patchRows: 8, patchColumns: 4, depth: 16, buffers: 2 },
  { rows: 64, columns: 128, patchRows: 4, patchColumns: 8, buffers: 2 },
  { rows: 64, columns: 128, patchRows: 8, patchColumns: 8 },
  { rows: 64, columns: 128, patchRows: 8, patchColumns: 8, buffers: 2 },
  { rows: 64, columns: 256, patchRows: 8, patchColumns: 8 },
  { rows: 128, columns: 64, patchRows: 8, patchColumns: 4, buffers: 2 },
  { rows: 128, columns: 128, patchRows: 8, patchColumns: 4 },
  { rows: 128, columns: 128, patchRows: 8, patchColumns: 8 },
  { rows: 128, columns: 128, patchRows: 8, patchColumns: 8, buffers: 2 },
];

/** The most rows that a tile is for. */
export function mostRows({ upTo, rows }: PrefillTile): number {
  return upTo ?? rows;
}

/** `64x128 8x4 K32 b2`: a tile in a table; without K, where that is the usual one. */
export function tileName(tile: PrefillTile): string {
  const { rows, columns, patchRows, patchColumns, depth, buffers } = tile;
  return `${rows}x${columns} ${patchRows}x${patchColumns}` +
    (depth === undefined ? "" : ` K${depth}`) + (buffers === 2 ? " b2" : "");
}

/** The codes of a matrix, as far as a prefill kernel depends on them. */
export interface PrefillCode {
  format: CodeGemmFormat;
  order: Pick<CodeOrder, "rowBlock" | "scalePositions">;
  /** Weights and activations are multiplied as integers, and the products of so many positions summed. */
  int8Positions?: number;
}

/**
 * K of a tile in groups: of a group, float16 sums of 16 consecutive K are made (see
 * {@linkcode chainQuads}), or one sum of integers. A group is filled up with zeros to quads, 4 values
 * along K.
 */
export interface TileK {
  depth: number;
  groupK: number;
  groups: number;
  groupQuads: number;
  /** All quads of a tile, of one row or column. */
  quads: number;
}

const CHAIN_QUADS = FLOAT16_SUM / 4;
const DEFAULT_DEPTH = 32;
const INT8_DEPTH = 64;
const DEFAULT_COPIES = 4;
/** Above it, the vectors of a code word are too much for a tile. */
const LONG_VECTOR = 32;

/** Threads along N and along the step's rows. */
export function threadGrid(tile: PrefillTile): { columns: number; rows: number } {
  return { columns: tile.columns / tile.patchColumns, rows: tile.rows / tile.patchRows };
}

/** Threads of a prefill workgroup. */
export function prefillThreads(tile: PrefillTile): number {
  const { columns, rows } = threadGrid(tile);
  return columns * rows;
}

/** K that a group of a CodeGEMM matrix has: whole codes of one scale, or whole chains of one code. */
export function prefillGroupK({ format: { v }, order, int8Positions }: PrefillCode): number {
  if (int8Positions) return int8Positions * v;
  if (v > FLOAT16_SUM && v % FLOAT16_SUM === 0) return FLOAT16_SUM;
  return v * largestDivisor(order.scalePositions, Math.max(1, Math.floor(FLOAT16_SUM / v)), 1);
}

/** The sums of a prefill output over K: each on its own, then one after the other. */
export interface PrefillSplits {
  /** K of one, but for the last, which may be shorter. */
  splitK: number;
  splits: number;
}

/** Workgroups that fill a large GPU, of a tile of this many columns and all rows of a short prompt. */
const WANTED_WORKGROUPS = 256;
const USUAL_COLUMNS = 128;
/** K that is worth a sum of its own, and what its length is a multiple of: of tiles' too. */
const MIN_SPLIT_K = 1024;
const SPLIT_K_STEP = 256;

/**
 * How prefill rows split K: part of the order of sums, so it follows from shape and format alone.
 * Matrices of few rows of N have too few tiles to fill a GPU; they make several sums of each output.
 */
export function prefillSplits([n, k]: MatrixShape, code: PrefillCode | null): PrefillSplits {
  const whole = { splitK: k, splits: 1 };
  if (code === null || itemPositions(code) === null) return whole;
  if (SPLIT_K_STEP % tileStep(code) !== 0) return whole;
  const wanted = Math.ceil(WANTED_WORKGROUPS / Math.ceil(n / USUAL_COLUMNS));
  const splits = Math.min(wanted, Math.floor(k / MIN_SPLIT_K));
  if (splits <= 1) return whole;
  const splitK = roundUp(Math.ceil(k / splits), SPLIT_K_STEP);
  return { splitK, splits: Math.ceil(k / splitK) };
}

/** The quads of a group's float16 sums, one after the other. */
export function chainQuads({ groupQuads }: Pick<TileK, "groupQuads">): number[] {
  return Array.from(
    { length: Math.ceil(groupQuads / CHAIN_QUADS) },
    (_, i) => Math.min(CHAIN_QUADS, groupQuads - i * CHAIN_QUADS),
  );
}

/**
 * Codes that a thread takes from one load of code words, those of a word or one of them (of integers,
 * as many as fill words of 16 bytes within a group); null where codes do not fill quads, and weights
 * are put together one by one.
 */
export function itemPositions(code: PrefillCode): number | null {
  const { v } = code.format;
  const perWord = codesPerWord(code.format);
  const groupK = prefillGroupK(code);
  if (code.int8Positions) {
    const fitting = [perWord, perWord / 2, 1].find((positions) =>
      positions * v % INT8_WORD_K === 0 && groupK % (positions * v) === 0
    );
    invariant(fitting !== undefined, "groups of integers are of whole words");
    return fitting;
  }
  if (v % 4 !== 0 || v > LONG_VECTOR) return null;
  return lcm(perWord * v, groupK) <= DEFAULT_DEPTH ? perWord : 1;
}

/** How a tile cuts K; `code` is null for dense. */
export function tileK(tile: PrefillTile, code: PrefillCode | null): TileK {
  if (code === null) return groups(DENSE_K_ALIGN, DENSE_K_ALIGN);
  const groupK = prefillGroupK(code);
  const step = tileStep(code);
  const depth = tile.depth ?? (code.int8Positions ? INT8_DEPTH : DEFAULT_DEPTH);
  return groups(Math.max(1, Math.floor(depth / step)) * step, groupK);
}

/** What a tile's K is a multiple of: whole groups, and all codes of a load. */
function tileStep(code: PrefillCode): number {
  const groupK = prefillGroupK(code);
  const positions = itemPositions(code);
  return positions === null ? groupK : lcm(groupK, positions * code.format.v);
}

function groups(depth: number, groupK: number): TileK {
  const groupQuads = Math.ceil(groupK / 4);
  const count = depth / groupK;
  return { depth, groupK, groups: count, groupQuads, quads: count * groupQuads };
}

/**
 * Quads that a thread's rows or columns take in workgroup memory: so many more than they are that
 * neighbouring threads, reading two quads at a time, meet in no bank.
 */
export function paddedQuads(quads: number): number {
  return quads + (6 - quads % 4) % 4;
}

/** What rows and columns of a tile are made of in workgroup memory: values along K in one vector. */
export interface TilePieces {
  type: "vec4<f16>" | "vec4<u32>";
  bytes: number;
  /** K of one. */
  k: number;
  /** Of one row or column; of integers, the codebooks' weights stand side by side. */
  row: number;
  column: number;
  /** Of all rows or columns of a thread, and what keeps them out of other threads' banks. */
  threadRows: number;
  threadColumns: number;
}

/** The pieces of a tile; `code` is null for dense. */
export function tilePieces(tile: PrefillTile, code: PrefillCode | null): TilePieces {
  const { quads } = tileK(tile, code);
  const [type, bytes, k] = code?.int8Positions
    ? ["vec4<u32>", 16, INT8_WORD_K] as const
    : ["vec4<f16>", 8, 4] as const;
  const row = quads * 4 / k;
  const column = code?.int8Positions ? row * code.format.m : row;
  const padded = (pieces: number) => paddedQuads(pieces * bytes / 8) * 8 / bytes;
  return {
    type,
    bytes,
    k,
    row,
    column,
    threadRows: padded(tile.patchRows * row),
    threadColumns: padded(tile.patchColumns * column),
  };
}

/** Workgroup memory of a prefill kernel, beside its codebooks. */
export function prefillBytes(tile: PrefillTile, code: PrefillCode | null): number {
  const { bytes, threadRows, threadColumns } = tilePieces(tile, code);
  const grid = threadGrid(tile);
  const scales = code?.int8Positions ? (tile.rows + tile.columns) * tileK(tile, code).groups : 0;
  const held = (grid.rows * threadRows + grid.columns * threadColumns) * bytes + scales * 4;
  return held * (tile.buffers ?? 1);
}

/** How often the codebooks stand in workgroup memory: 0 where they do not fit once. */
export function tableCopies(tile: PrefillTile, code: PrefillCode, workgroupBytes: number): number {
  if (itemPositions(code) === null) return 0;
  const free = workgroupBytes - prefillBytes(tile, code);
  const { m, v } = code.format;
  const fit = Math.floor(
    free / (m * centroidCount(code.format) * v * (code.int8Positions ? 1 : 2)),
  );
  if (fit < 1) return 0;
  return Math.min(tile.copies ?? DEFAULT_COPIES, 1 << Math.floor(Math.log2(fit)));
}

/**
 * WGSL that declares `tx` and `ty`, a thread's place in its workgroup. Neighbouring threads differ in
 * both: reading 16 bytes each, 32 threads then take two turns at the banks instead of four, because
 * the threads of a half warp read few addresses and every address is wanted by two neighbours.
 */
export function threadPlace(tile: PrefillTile): string {
  const grid = threadGrid(tile);
  const bits = { x: Math.log2(grid.columns), y: Math.log2(grid.rows) };
  invariant(Number.isInteger(bits.x) && Number.isInteger(bits.y), "a tile is of powers of two");
  const taken = { x: 0, y: 0 };
  const places = { x: [] as string[], y: [] as string[] };
  const wanted = [..."yxxxy", ..."x".repeat(bits.x), ..."y".repeat(bits.y)] as ("x" | "y")[];
  let lane = 0;
  for (const axis of wanted) {
    if (taken[axis] === bits[axis]) continue;
    places[axis].push(`((lane >> ${lane++}u) & 1u) << ${taken[axis]++}u`);
  }
  const place = (parts: string[]) => parts.map((part) => `(${part})`).join(" | ") || "0u";
  return `  let tx = ${place(places.x)};\n  let ty = ${place(places.y)};`;
}
