/**
 * The prefill rows of a linear layer: a kernel for each tile that the adapter can hold.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { Gpu } from "../gpu.ts";
import { bindGroup, isVectorInput, type Uniforms } from "./binding.ts";
import { hasPackedDot } from "./code_words_wgsl.ts";
import type { PrefillTile } from "./prefill_tile.ts";
import { mostRows, prefillBytes, prefillThreads } from "./prefill_tile.ts";
import { prefillWgsl } from "./prefill_wgsl.ts";
import type { LinearOptions, Matrix } from "./types.ts";
import type { Variant } from "./variant.ts";

const CODE_BINDINGS = ["uniform", "uniform", "read", "write", "read", "read", "read"] as const;
const DENSE_BINDINGS = ["uniform", "uniform", "read", "write", "read"] as const;

/** In place of tiles that no workgroup can hold: codes of very many weights have deep ones. */
const SMALL_TILE: PrefillTile = { rows: 8, columns: 32, patchRows: 2, patchColumns: 2 };

/** Kernels by rising rows of their tiles, and what they are bound to. */
export interface PrefillPlan {
  kernels: { tile: PrefillTile; pipeline: GPUComputePipeline }[];
  blocks: { group: GPUBindGroup; n: number }[];
}

/** The codes of a matrix, as prefill kernels want them; null for dense. */
export function codesOf({ format, order }: Matrix) {
  return order.kind === "code" && format !== null ? { format, order } : null;
}

/** The tiles of a list that an adapter can hold for a matrix; a small one if there is none. */
export function holdableTiles(
  { limits }: Pick<Gpu, "limits">,
  matrix: Matrix,
  tiles: readonly PrefillTile[],
): PrefillTile[] {
  const code = codesOf(matrix);
  const held = tiles.filter((tile) =>
    prefillThreads(tile) <= limits.maxComputeInvocationsPerWorkgroup &&
    prefillBytes(tile, code) <= limits.maxComputeWorkgroupStorageSize
  );
  return held.length > 0 ? held : [SMALL_TILE];
}

/** A prefill kernel's code. */
export function prefillCode(
  { gpu, matrix, input, store }: Pick<LinearOptions, "gpu" | "matrix" | "store"> & {
    input: { stride: number; offset: number };
  },
  { unroll }: Pick<Variant, "unroll">,
  tile: PrefillTile,
): string {
  return prefillWgsl({
    tile,
    code: codesOf(matrix),
    k: matrix.k,
    vectorInput: isVectorInput({ input, matrix }),
    unroll,
    workgroupBytes: gpu.limits.maxComputeWorkgroupStorageSize,
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
  const { gpu, label, matrix, step, input, output, maxRows } = options;
  const bindings = matrix.format === null ? DENSE_BINDINGS : CODE_BINDINGS;
  const kernels: PrefillPlan["kernels"] = [];
  for (const tile of holdableTiles(gpu, matrix, variant.prefillTiles)) {
    const code = prefillCode(options, variant, tile);
    const pipeline = await gpu.pipeline({ label: `${label} prefill`, code, bindings });
    kernels.push({ tile, pipeline });
  }
  const blocks = matrix.blocks.map((block) => ({
    n: block.n,
    group: bindGroup(gpu, `${label} prefill`, bindings, [
      step,
      uniforms.add(block, { row_base: 0, row_cap: maxRows, range: "prefill" }),
      input.buffer,
      output.buffer,
      block.weights,
      ...matrix.format === null ? [] : [matrix.codebooks!, block.scales!],
    ]),
  }));
  return { kernels, blocks };
}

/** Adds the dispatches of a step's prefill rows. */
export function encodePrefill(pass: GPUComputePassEncoder, plan: PrefillPlan, rows: number): void {
  if (rows === 0) return;
  const kernel = plan.kernels.find(({ tile }) => mostRows(tile) >= rows) ?? plan.kernels.at(-1);
  invariant(kernel !== undefined, "a prefill plan has kernels");
  pass.setPipeline(kernel.pipeline);
  for (const block of plan.blocks) {
    pass.setBindGroup(0, block.group);
    pass.dispatchWorkgroups(
      Math.ceil(block.n / kernel.tile.columns),
      Math.ceil(rows / kernel.tile.rows),
    );
  }
}
