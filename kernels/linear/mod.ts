/**
 * Linear layers: `y = W x` over the rows of a step, for CodeGEMM and dense float16 matrices.
 *
 * @module
 */
export type { Linear, LinearOptions, Matrix, MatrixBlock, MatrixShape } from "./types.ts";
