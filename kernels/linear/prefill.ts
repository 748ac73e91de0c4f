/**
 * The prefill rows of a linear layer: a kernel for each tile that the adapter can hold.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { Gpu } from "../gpu.ts";
import {
  bindGroup,
  isVectorInput,
  isVectorOutput,
  prefillChunkRows,
  prefillCodes,
  type Uniforms,
} from "./binding.ts";
import { hasPackedDot } from "./code_words_wgsl.ts";
import { encodeInt8Rows, type Int8RowsPlan, int8RowsWgsl, planInt8Rows } from "./int8_rows.ts";
import { int8GroupK } from "./order.ts";
import type { Output } from "./output_wgsl.ts";
import type { PrefillCode, PrefillTile } from "./prefill_tile.ts";
import { mostRows, prefillBytes, prefillSplits, prefillThreads } from "./prefill_tile.ts";
import { prefillWgsl } from "./prefill_wgsl.ts";
import { REDUCE_BINDINGS, reduceColumns, reduceWgsl } from "./reduce_wgsl.ts";
import type { LinearOptions, Matrix } from "./types.ts";
import { decodeFamily, type Variant } from "./variant.ts";

const CODE_BINDINGS = ["uniform", "uniform", "read", "write", "read", "read", "read"] as const;
/** The scales of rows as integers last. */
const INT8_BINDINGS = [...CODE_BINDINGS, "read"] as const;
const DENSE_BINDINGS = ["uniform", "uniform", "read", "write", "read"] as const;

/**
 * In place of tiles that no workgroup can hold, the first that it can: codes of very many weights have
 * deep ones, integers of several codebooks several of each.
 */
const SMALL_TILES: PrefillTile[] = [
  { rows: 8, columns: 32, patchRows: 2, patchColumns: 2 },
  { rows: 8, columns: 16, patchRows: 2, patchColumns: 1 },
];

/** Kernels by rising rows of their tiles, and what they are bound to. */
export interface PrefillPlan {
  kernels: { tile: PrefillTile; pipeline: GPUComputePipeline }[];
  splits: number;
  /** Ahead of kernels whose input are integers. */
  rounding: Int8RowsPlan | null;
  /** Puts splits together, where there are several. */
  reduce: { pipeline: GPUComputePipeline; columns: number } | null;
  /** Rows of a chunk: what the scratch holds, or all. */
  chunkRows: number;
  /** `[chunk][binding block]` */
  chunks: { main: GPUBindGroup; reduce: GPUBindGroup | null; n: number }[][];
}

/** The codes of a layer's prefill rows: integers where its decode rows are; null for dense. */
export function layerCodes(
  { matrix, profile }: Pick<LinearOptions, "matrix" | "profile">,
): PrefillCode | null {
  const code = prefillCodes(matrix);
  if (code === null || decodeFamily(matrix, profile) !== "int8") return code;
  return { ...code, int8Positions: int8GroupK(matrix) / code.format.v };
}

/** The tiles of a list that an adapter can hold for a matrix; a small one if there is none. */
export function holdableTiles(
  { limits }: Pick<Gpu, "limits">,
  matrix: Matrix,
  tiles: readonly PrefillTile[],
  code = prefillCodes(matrix),
): PrefillTile[] {
  const holdable = (tile: PrefillTile) =>
    prefillThreads(tile) <= limits.maxComputeInvocationsPerWorkgroup &&
    prefillBytes(tile, code) <= limits.maxComputeWorkgroupStorageSize;
  const held = tiles.filter(holdable);
  return held.length > 0 ? held : [SMALL_TILES.find(holdable) ?? SMALL_TILES[0]];
}

/** A prefill kernel's code. */
export function prefillCode(
  { gpu, matrix, input, store }: Pick<LinearOptions, "gpu" | "matrix" | "store"> & {
    input: { stride: number; offset: number };
  },
  { unroll }: Pick<Variant, "unroll">,
  tile: PrefillTile,
  code = prefillCodes(matrix),
): string {
  return prefillWgsl({
    tile,
    code,
    splits: prefillSplits([matrix.n, matrix.k], code),
    k: matrix.k,
    vectorInput: isVectorInput({ input, matrix }),
    unroll,
    workgroupBytes: gpu.limits.maxComputeWorkgroupStorageSize,
    members: matrix.members.length,
    packedDot: hasPackedDot(),
    store,
  });
}

/** Compiles the kernels of a layer's prefill rows and binds them. */
export async function planPrefill(
  options: LinearOptions,
  variant: Variant,
  uniforms: Uniforms,
): Promise<PrefillPlan> {
  const { gpu, label, matrix, step, input, output, scratch, store, maxRows } = options;
  const codes = layerCodes(options);
  const int8 = codes?.int8Positions !== undefined;
  const bindings = codes === null ? DENSE_BINDINGS : int8 ? INT8_BINDINGS : CODE_BINDINGS;
  const { splits } = prefillSplits([matrix.n, matrix.k], codes);
  const direct = splits === 1;
  const chunkRows = prefillChunkRows(options);
  invariant(chunkRows >= 1, `the scratch of ${scratch.size} bytes holds a prefill row of ${label}`);
  const kernels: PrefillPlan["kernels"] = [];
  for (const tile of holdableTiles(gpu, matrix, variant.prefillTiles, codes)) {
    const code = prefillCode(options, variant, tile, codes);
    const pipeline = await gpu.pipeline({ label: `${label} prefill`, code, bindings });
    kernels.push({ tile, pipeline });
  }
  const order = { splits, slices: 1 };
  const whole: Output = { store, vector: isVectorOutput(options) };
  const reduce = direct ? null : {
    pipeline: await gpu.pipeline({
      label: `${label} prefill reduce`,
      code: reduceWgsl(order, whole),
      bindings: REDUCE_BINDINGS,
    }),
    columns: reduceColumns(order, whole),
  };
  const { int8Rows } = options;
  invariant(!int8 || int8Rows, `${label} has buffers for rows as integers`);
  const books = int8 ? matrix.int8Codebooks : matrix.codebooks;
  const chunks: PrefillPlan["chunks"] = [];
  for (let base = 0; base < maxRows; base += chunkRows) {
    chunks.push(matrix.blocks.map((block) => {
      const at = { row_base: base, row_cap: chunkRows, range: "prefill" } as const;
      const params = uniforms.add(block, at);
      return {
        n: block.n,
        main: bindGroup(gpu, `${label} prefill`, bindings, [
          step,
          params,
          int8 ? int8Rows!.values : input.buffer,
          direct ? output.buffer : scratch,
          block.weights,
          ...codes === null ? [] : [books!, block.scales!],
          ...int8 ? [int8Rows!.largest] : [],
        ]),
        reduce: direct ? null : bindGroup(gpu, `${label} prefill reduce`, REDUCE_BINDINGS, [
          step,
          params,
          scratch,
          output.buffer,
        ]),
      };
    }));
  }
  const rounding = int8
    ? await planInt8Rows(
      options,
      int8Rows!,
      int8RowsWgsl(int8GroupK(matrix), hasPackedDot()),
      "prefill",
      uniforms,
    )
    : null;
  return { kernels, splits, rounding, reduce, chunkRows, chunks };
}

/** Adds the dispatches of a step's prefill rows. */
export function encodePrefill(pass: GPUComputePassEncoder, plan: PrefillPlan, rows: number): void {
  if (plan.rounding !== null && rows > 0) encodeInt8Rows(pass, plan.rounding, rows);
  for (let c = 0, from = 0; from < rows; c++, from += plan.chunkRows) {
    invariant(c < plan.chunks.length, `a layer was bound for fewer than ${rows} prefill rows`);
    const count = Math.min(plan.chunkRows, rows - from);
    const kernel = plan.kernels.find(({ tile }) => mostRows(tile) >= count) ?? plan.kernels.at(-1)!;
    for (const block of plan.chunks[c]) {
      pass.setPipeline(kernel.pipeline);
      pass.setBindGroup(0, block.main);
      pass.dispatchWorkgroups(
        Math.ceil(block.n / kernel.tile.columns),
        Math.ceil(count / kernel.tile.rows),
        plan.splits,
      );
      if (plan.reduce === null) continue;
      pass.setPipeline(plan.reduce.pipeline);
      pass.setBindGroup(0, block.reduce);
      pass.dispatchWorkgroups(Math.ceil(block.n / plan.reduce.columns), count);
    }
  }
}
