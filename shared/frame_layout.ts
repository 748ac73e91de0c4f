/**
 * Where everything stands in a frame: a versioned header of fixed size, then sections of typed arrays.
 *
 * All numbers are little-endian. Sections of eight-byte elements come first, then those of four, then
 * those of two, so that every section is aligned without padding and decoding makes views of the
 * frame's own buffer. The header's counts give every section's size; their sum must be the frame's
 * length to the byte, so a frame with a lying count is refused before anything is read by it.
 *
 * ```
 * header   0 u32 magic  4 u16 version  6 u8 kind  7 u8 zero
 *          8 u32 epoch, attempt, attemptBase, step   24 f64 issuedAtMs   32 u32 traces
 *         36 u32 x 9: the kind's counts
 * step     f64 traces (T, 5)   f64 sampling (R, 4)   u32 requests (R, 10)
 *          u32 pages per sequence (S)   u32 pages (P)   u32 row positions (N)   u32 row tokens (N)
 *          u32 bias tokens (B)   f32 bias values (B)   u32 counted tokens (C)   u32 counts (C)
 *          u16 hidden (N, H)   u16 row sequences (N)
 * result   f64 traces (T, 5)   f64 log-probabilities (R)   u32 results (R, 4)
 *          u32 alternatives (A)   f32 their log-probabilities (A)   f32 logits (L)
 * ```
 *
 * @module
 */
import { invariant } from "./errors.ts";

/** "CGFM" in the order of the bytes. */
export const MAGIC = 0x4d464743;
/** Raised with every change of the layout. */
export const VERSION = 1;
/** What a frame is. */
export const KIND = { step: 1, result: 2 } as const;

/** Bytes of the header, and where its fields begin. */
export const HEADER_BYTES = 72;
export const ORDER_AT = 8;
export const ISSUED_AT = 24;
export const TRACES_AT = 32;
export const COUNTS_AT = 36;
/** Counts in the header; those that a kind has no use for are 0. */
export const COUNTS = 9;

/** Elements per trace, per row of the sampling and request tables, and per result. */
export const TRACE_VALUES = 5;
export const SAMPLING_VALUES = 4;
export const REQUEST_WORDS = 10;
export const RESULT_WORDS = 4;
/** The first word of a request or result. */
export const TYPE = { sample: 1, score: 2, logits: 3 } as const;

invariant(
  new Uint8Array(Uint32Array.of(1).buffer)[0] === 1,
  "sections are views, so the machine must be little-endian",
);

/** What decides the size of a step's frame. */
export interface StepFrameShape {
  rows: number;
  sequences: number;
  /** Page table entries of all sequences together. */
  pageEntries: number;
  requests: number;
  /** `biasTokens` of all rows together. */
  biasEntries: number;
  /** `countTokens` of all rows together. */
  countEntries: number;
  hiddenSize: number;
  /** Stages of the pipeline. */
  stages: number;
}

/**
 * The size of a step's frame where it is largest: on the way to the last stage, with the activations
 * and the traces of all stages before. With one stage that is the frame as issued, without activations.
 *
 * @returns bytes; exact, so it is additive in every field for a given `hiddenSize` and `stages`
 */
export function stepFrameBytes(shape: StepFrameShape): number {
  return stepBytes({
    ...shape,
    traces: Math.max(0, shape.stages - 1),
    hiddenSize: shape.stages > 1 ? shape.hiddenSize : 0,
  });
}

/** The size of a result frame, bytes; exact. `alternatives` and `logits` are entries of all rows. */
export function resultFrameBytes(
  shape: { results: number; alternatives: number; logits: number; stages: number },
): number {
  return resultBytes({ ...shape, traces: shape.stages });
}

/** The size of a step frame with these sections, bytes. */
export function stepBytes(counts: Omit<StepFrameShape, "stages"> & { traces: number }): number {
  return HEADER_BYTES + counts.traces * TRACE_VALUES * 8 +
    counts.requests * (SAMPLING_VALUES * 8 + REQUEST_WORDS * 4) +
    (counts.sequences + counts.pageEntries) * 4 +
    (counts.biasEntries + counts.countEntries) * 8 +
    counts.rows * (4 + 4 + 2 + 2 * counts.hiddenSize);
}

/** The size of a result frame with these sections, bytes. */
export function resultBytes(
  counts: { results: number; alternatives: number; logits: number; traces: number },
): number {
  return HEADER_BYTES + counts.traces * TRACE_VALUES * 8 +
    counts.results * (8 + RESULT_WORDS * 4) + counts.alternatives * 8 + counts.logits * 4;
}
