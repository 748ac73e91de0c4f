/**
 * What a linear layer looks like from outside: a matrix on the GPU, and the kernels bound to it.
 *
 * @module
 */
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import type { NumericsProfile } from "../../shared/protocol.ts";
import type { BindingKind, Gpu } from "../gpu.ts";
import type { LinearStore, RowRange, RowsView, StepShape } from "../kernel.ts";
import type { CodeOrder, DenseOrder } from "./order.ts";
import type { Variant } from "./variant.ts";

/** `[N, K]`: outputs, inputs. */
export type MatrixShape = readonly [n: number, k: number];

/** Rows `[start, start + n)` of a matrix, small enough for one storage binding. */
export interface MatrixBlock {
  start: number;
  n: number;
  /** Dense: the float16 weights. CodeGEMM: the code words. Tiled as `layout.ts` says. */
  weights: GPUBuffer;
  /** CodeGEMM only: float16 scales, tiled. */
  scales: GPUBuffer | null;
}

/** The weights of one linear layer, `y = W x`, on the GPU. */
export interface Matrix {
  /** `model.layers.0.self_attn.q_proj`. */
  readonly name: string;
  readonly n: number;
  readonly k: number;
  /** Null for dense float16; `g` is that of this matrix, whatever the checkpoint calls it. */
  readonly format: CodeGemmFormat | null;
  /** How sums over K are ordered; follows from shape and format. */
  readonly order: CodeOrder | DenseOrder;
  readonly blocks: readonly MatrixBlock[];
  /** The matrices that this one is stacked from along N; one where it is not a stack. */
  readonly members: readonly { start: number; n: number }[];
  /** CodeGEMM only: `(members, m, 2^b, v)` float16. */
  readonly codebooks: GPUBuffer | null;
  /**
   * CodeGEMM with {@linkcode CodeOrder.int8Positions} only: the codebooks as int8, four a word; then a
   * float32 scale for each member.
   */
  readonly int8Codebooks: GPUBuffer | null;
  /** Bytes of GPU memory, padding included. */
  readonly bytes: number;
  destroy(): void;
}

/**
 * The rows of a step's view as integers. Row r of the view, of K elements in groups of G
 * (`int8Positions * v`), has its own place whatever range it is of.
 */
export interface Int8Rows {
  /** int8, row-major `(rows, K)`: `vec4<u32>` of 16 elements. */
  values: GPUBuffer;
  /** float32, row-major `(rows, K / G)`: of each group the largest magnitude. */
  largest: GPUBuffer;
}

/**
 * What becomes of the decode rows' sums in place of storing them, four pairs at a time: columns
 * `[n, n + 4)` and columns `[n + half, n + half + 4)`, in runs of `2 half` columns.
 */
export interface PairFinish {
  /** A layer only finishes halves of a multiple of 4. */
  half: number;
  /**
   * WGSL with bindings from `@binding(firstBinding)` on and
   * `fn finish(row: u32, n: u32, first: vec4<f32>, second: vec4<f32>)`; it may call
   * `put_quad(row, n, value)`, which stores four columns as the layer would have.
   */
  code(firstBinding: number): string;
  bindings: readonly BindingKind[];
  buffers: readonly GPUBuffer[];
}

/** What {@linkcode createLinear} needs. */
export interface LinearOptions {
  gpu: Gpu;
  /** For messages and GPU captures. */
  label: string;
  matrix: Matrix;
  /** The step's uniform (`STEP_WGSL`). */
  step: GPUBuffer;
  /** float16, `K` elements a row. Rows that the step does not name may hold anything. */
  input: RowsView;
  /** float32, `N` elements a row; another buffer than the input's and the scratch. */
  output: RowsView;
  store: LinearStore;
  /** No range of a step has more rows. */
  maxRows: number;
  /**
   * Storage for partial sums, at least `linearScratchBytes(...)` of this matrix; one buffer may serve
   * all linear layers of a stage, because dispatches of a pass run in order.
   */
  scratch: GPUBuffer;
  /**
   * For rows as integers, of at least this layer's K and all rows of the input's view: where the
   * profile's family is `int8`. One pair may serve all layers of a stage.
   */
  int8Rows?: Int8Rows;
  /** Taken where the layer can: see {@linkcode Linear.finishes}. */
  finish?: PairFinish;
  /** The ranges that `encode` will be called with. */
  ranges: readonly RowRange[];
  profile: NumericsProfile;
  /** What autotuning may choose; by default what suits the adapter's limits. */
  variant?: Partial<Variant>;
}

/** A linear layer bound to its buffers. */
export interface Linear {
  readonly label: string;
  /** Decode rows are finished, not stored; prefill rows are always stored. */
  readonly finishes: boolean;
  /**
   * Adds the dispatches for a range's rows to the pass: decode rows `[0, decodeRows)`, prefill rows
   * `[decodeRows, rows)`, outputs `[0, outputs)` of the input and output views. None when it is empty.
   */
  encode(pass: GPUComputePassEncoder, shape: StepShape, range: RowRange): void;
  /** Frees its small uniform buffer; the matrix stays. */
  destroy(): void;
}
