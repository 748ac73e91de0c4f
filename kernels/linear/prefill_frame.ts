/**
 * What the parts of a prefill kernel's generator tell each other.
 *
 * @module
 */
import type { LinearStore } from "../kernel.ts";
import type { PrefillCode, PrefillSplits, PrefillTile, TileK, TilePieces } from "./prefill_tile.ts";
import { times } from "./wgsl.ts";

/** What a prefill kernel is generated from; `code` is null for dense. */
export interface PrefillKernel {
  tile: PrefillTile;
  code: PrefillCode | null;
  /** K of the matrix: kernels of whole tiles check less. */
  k: number;
  splits: PrefillSplits;
  /** K is a multiple of 4, and input rows begin at one: the input is bound as vectors of 4. */
  vectorInput: boolean;
  /** Straight code, and loads a tile ahead. */
  unroll: boolean;
  /** Workgroup memory that may be used. */
  workgroupBytes: number;
  /** Matrices of the stack. */
  members: number;
  /** WGSL has packed dot products. */
  packedDot: boolean;
  store: LinearStore;
}

/** A value that a thread loads for a tile. */
export interface TileLoad {
  name: string;
  type: string;
  /** WGSL of the value; `k` is WGSL of where the tile begins. */
  value(k: string): string;
}

/** Values that threads copy into workgroup memory for every tile, one an item. */
export interface TileCopy {
  /** What threads share out among them. */
  items: number;
  type: string;
  /** WGSL names, in straight code: of an item, of where it begins whatever the tile, of its value. */
  names: { item: string; start: string; next: string };
  /** WGSL of where item `i` begins. */
  start(i: string): string;
  /** WGSL of item `i`'s value in the tile that begins at `k`. */
  value(i: string, start: string, k: string): string;
  /** Statement that puts the value into its place. */
  put(i: string, value: string): string;
}

/** The half of a prefill kernel that knows the activations. */
export interface RowSource {
  /** Element of the binding `x`. */
  type: string;
  declarations: string;
  copies: TileCopy[];
}

/** The half of a prefill kernel that knows the weights. */
export interface WeightSource {
  declarations: string;
  prologue: string;
  /** What threads share out among them when they fill a tile. */
  items: number;
  /** What item `i` loads, into names that end in `slot`. */
  load(i: string, slot: string): TileLoad[];
  /** Statements that put what was loaded into `tile_w[buffer_x + ...]`. */
  fill(i: string, slot: string): string;
  /** What is beside the weights in workgroup memory. */
  copies: TileCopy[];
  /** What a thread loads for its own columns; none where it loads as it multiplies. */
  own: TileLoad[];
  /** Statements that add a tile's products to the variables `acc{row}_{column}`. */
  products: string;
}

/** Constants of a kernel that both halves of its code are made from. */
export interface PrefillFrame {
  kernel: PrefillKernel;
  k: TileK;
  pieces: TilePieces;
  /** Tiles in workgroup memory. */
  buffers: number;
  threadColumns: number;
  /** K of the matrix is not a multiple of the tile's. */
  tail: boolean;
}

/** A line for every output of a thread's patch. */
export function eachOutput(tile: PrefillTile, body: (r: number, c: number) => string): string {
  return times(tile.patchRows, (r) => times(tile.patchColumns, (c) => body(r, c)));
}

/** WGSL of the row of the views that row `row` of a tile is; rows past the last are read as the last. */
export function viewRow(row: string): string {
  return `(first_row + min(row0 + ${row}, rows - 1u))`;
}

/** WGSL of the place of piece `i` of a tile's rows. */
export function rowPlace({ kernel: { tile }, pieces }: PrefillFrame, i: string): string {
  const row = `${i} / ${pieces.row}u`;
  return `tile_x[buffer_y + ${row} / ${tile.patchRows}u][(${row}) % ${tile.patchRows}u * ${pieces.row}u + ${i} % ${pieces.row}u]`;
}
