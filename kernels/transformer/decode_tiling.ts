/**
 * How decode attention cuts a context into splits, and how a split's workgroup shares its work.
 *
 * @module
 */
import { PAGE_TOKENS } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

/** Pages of a split of the context: few, so that one long context fills a large GPU. */
export const SPLIT_PAGES = 2;

/** Positions of a split of the context. */
export const SPLIT_TOKENS = SPLIT_PAGES * PAGE_TOKENS;

/** Vectors of 4 positions of a split. */
export const SCORE_QUADS = SPLIT_TOKENS / 4;
/** Their first of two indices into exchanged vectors; the second is one of four. */
export const SCORE_ROWS = SCORE_QUADS / 4;

/**
 * How a split's workgroup shares its work. All counts but those of quads (4 dimensions) are powers of
 * two.
 */
export interface Tiling {
  lanes: number;
  /** Query heads; the last ones may have nothing to do. */
  heads: number;
  /** Scores: a lane takes its slot in both pages, every head, and a part of the dimensions. */
  scores: { parts: number; partQuads: number; turnQuads: number };
  /**
   * Values: a lane takes 4 dimensions, the heads of a set, and a run of positions, four a turn. Its
   * weights come in `vectors` of as many heads as there are, up to four. The runs put so many heads
   * together at a time.
   */
  values: {
    sets: number;
    setHeads: number;
    vectors: number;
    runs: number;
    runTokens: number;
    together: number;
  };
  /** Exchanged vectors: (high, parts, SCORE_ROWS, 4). */
  high: number;
}

/** The shares of a workgroup of these heads: a pure function of the shape, for it orders sums. */
export function tiling({ group, paddedDim }: HeadShape): Tiling {
  const quads = paddedDim / 4;
  // Large heads take more lanes, so that keys and values still fit a lane's registers.
  const lanes = quads <= 32 ? 128 : 256;
  const parts = lanes / PAGE_TOKENS;
  // At most 8 KiB are exchanged, with which four or five workgroups share 48 KiB.
  const heads = Math.min(powerOfTwoFrom(group), 1024 / lanes);
  const runs = 4 * quads <= lanes ? 4 : 2;
  const sets = Math.min(heads, powerOfTwoTo(lanes / (runs * quads)));
  const setHeads = heads / sets;
  const vectors = Math.ceil(setHeads / 4);
  const high = Math.max(heads, sets * vectors, lanes / (parts * SCORE_QUADS));
  const turnQuads = quads <= SCORE_ROWS * parts ? 1 : quads <= 2 * SCORE_ROWS * parts ? 2 : 4;
  return {
    lanes,
    heads,
    scores: { parts, partQuads: turnQuads * Math.ceil(quads / (turnQuads * parts)), turnQuads },
    values: {
      sets,
      setHeads,
      vectors,
      runs,
      runTokens: SPLIT_TOKENS / runs,
      together: Math.min(setHeads, high * parts * SCORE_QUADS / lanes),
    },
    high,
  };
}

const powerOfTwoTo = (n: number) => 2 ** Math.floor(Math.log2(n));
const powerOfTwoFrom = (n: number) => 2 ** Math.ceil(Math.log2(n));

/** Query heads of one KV head that share a workgroup. */
export function headTile(shape: HeadShape): number {
  return tiling(shape).heads;
}
