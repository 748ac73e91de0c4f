/**
 * What the transformer's kernels read of a step: its rows, page tables, tiles and output rows.
 *
 * @module
 */
import { LIMITS } from "../../shared/limits.ts";
import { STEP_WGSL, type StepShape } from "../kernel.ts";

/** Positions in a KV page. */
export const PAGE_TOKENS = LIMITS.pageTokens;

/** u32 words of a row: page table start, position, token, sequence. */
export const ROW_WORDS = 4;

/** u32 words of a prefill tile: first row, rows, page table start, unused. */
export const TILE_WORDS = 4;

/** The buffers that are written anew for each step. */
export interface StepInputs {
  /** Uniform, {@linkcode STEP_WGSL}. */
  step: GPUBuffer;
  /** One `Row` per row of the step. */
  rows: GPUBuffer;
  /** The page tables of all sequences, one after another; a row knows where its own starts. */
  pageTables: GPUBuffer;
  /** Runs of up to {@linkcode tileRows} prefill rows of one sequence. */
  tiles: GPUBuffer;
  /** The row of each output, u32. */
  outputRows: GPUBuffer;
}

/** The counts of a step, and the number of its prefill tiles. */
export interface TransformerShape extends StepShape {
  prefillTiles: number;
}

/** Types and functions that the transformer's kernels share. */
export const TRANSFORMER_TYPES_WGSL = /* wgsl */ `
struct Row {
  page_table: u32,
  position: u32,
  token: u32,
  sequence: u32,
}

struct Tile {
  first_row: u32,
  rows: u32,
  page_table: u32,
  unused: u32,
}

const PAGE_TOKENS = ${PAGE_TOKENS}u;

fn to_f16(value: f32) -> f16 {
  return f16(clamp(value, -65504.0, 65504.0));
}

fn to_f16x4(value: vec4<f32>) -> vec4<f16> {
  return vec4<f16>(clamp(value, vec4<f32>(-65504.0), vec4<f32>(65504.0)));
}
`;

/**
 * Complete WGSL from a kernel's own: what all of these kernels share, then `code`.
 *
 * Float16 is written through `to_f16` and `to_f16x4` only: WGSL leaves the result open where a value is out of
 * range, so it is clamped to the finite ones first.
 */
export function transformerWgsl(code: string): string {
  return /* wgsl */ `enable f16;
${STEP_WGSL}
${TRANSFORMER_TYPES_WGSL}
${code}`;
}
