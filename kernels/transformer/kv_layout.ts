/**
 * Shapes of attention heads and the layout of their pages in the KV cache.
 *
 * @module
 */
import { FleetError } from "../../shared/errors.ts";
import { PAGE_TOKENS } from "./inputs.ts";

/** Heads of a model, checked. */
export interface HeadShape {
  heads: number;
  kvHeads: number;
  /** Query heads that share one KV head. */
  group: number;
  headDim: number;
  /** `headDim` rounded up to a multiple of 4: what the cache holds. */
  paddedDim: number;
}

/** Head sizes from here on do not fit the kernels' workgroup memory at WebGPU's default limits. */
export const MAX_HEAD_DIM = 512;

/** @throws FleetError `bad-checkpoint` for heads that the kernels cannot run */
export function headShape(
  config: { heads: number; kvHeads: number; headDim: number },
): HeadShape {
  const { heads, kvHeads, headDim } = config;
  if (heads % kvHeads !== 0) {
    throw new FleetError(
      "bad-checkpoint",
      `${heads} attention heads cannot share ${kvHeads} KV heads evenly`,
    );
  }
  if (headDim < 8 || headDim % 2 !== 0 || headDim > MAX_HEAD_DIM) {
    throw new FleetError(
      "bad-checkpoint",
      `Attention heads of ${headDim}: only even sizes from 8 to ${MAX_HEAD_DIM} can be run`,
    );
  }
  return {
    heads,
    kvHeads,
    group: heads / kvHeads,
    headDim,
    paddedDim: Math.ceil(headDim / 4) * 4,
  };
}

/**
 * Bytes of one page of one layer's keys (its values take the same). Keys lie
 * `(page, kv head, dim/4, position, 4)`, values `(page, kv head, position, dim)`, float16.
 */
export function kvPageBytes(shape: HeadShape): number {
  return shape.kvHeads * PAGE_TOKENS * shape.paddedDim * 2;
}
