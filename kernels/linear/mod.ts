/**
 * Linear layers: `y = W x` over the rows of a step, for CodeGEMM and dense float16 matrices.
 *
 * @module
 */
export { CANDIDATES, type Trial, type Tuned, tuneLinear, tuningKey } from "./autotune.ts";
export { linearScratchBytes } from "./binding.ts";
export { createInt8Rows } from "./int8_rows.ts";
export { createLinear } from "./linear.ts";
export { isStackable, loadMatrix, loadStack, matrixBytes } from "./matrix.ts";
export type { LoadOptions, StackMember } from "./matrix.ts";
export { canStack } from "./order.ts";
export { holdableTiles, layerCodes } from "./prefill.ts";
export { mostRows, PREFILL_TILES, type PrefillTile, tileName } from "./prefill_tile.ts";
export { randomTensors } from "./random_tensors.ts";
export { syntheticCodes, syntheticDense } from "./synthetic.ts";
export type {
  Int8Rows,
  Linear,
  LinearOptions,
  Matrix,
  MatrixBlock,
  MatrixShape,
  PairFinish,
} from "./types.ts";
export { TrialBuffers } from "./trial.ts";
export { defaultVariant, kernelFor } from "./variant.ts";
export type { Variant } from "./variant.ts";
export { BATCHES } from "./wgsl.ts";
