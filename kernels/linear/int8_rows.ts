/**
 * Rows of activations rounded to integers ahead of the kernels that multiply them: where many
 * workgroups read the same rows, rounding them once costs less than in each.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { Gpu } from "../gpu.ts";
import type { RowRange } from "../kernel.ts";
import { bindGroup, isVectorInput, type Uniforms } from "./binding.ts";
import { int8Wgsl } from "./int8.ts";
import { INT8_WORD_K } from "./order.ts";
import type { Int8Rows, LinearOptions } from "./types.ts";
import { HEADER_WGSL, times } from "./wgsl.ts";

/** The least K of a group that any format has. */
const LEAST_GROUP_K = INT8_WORD_K;
/** Groups of one to four loads of 16 each end with a workgroup. */
const THREADS = 96;
const BINDINGS = ["uniform", "uniform", "read", "write", "write"] as const;

/** Bytes of the buffers for rows of up to `k` elements. */
export function int8RowsBytes(k: number, rows: number): { values: number; largest: number } {
  return { values: rows * k, largest: rows * k / LEAST_GROUP_K * 4 };
}

/** Buffers for rows of up to `k` elements; one pair may serve all layers of a stage. */
export function createInt8Rows(gpu: Gpu, k: number, rows: number): Int8Rows {
  const bytes = int8RowsBytes(k, rows);
  return {
    values: gpu.storage("int8 rows", bytes.values),
    largest: gpu.storage("largest magnitudes of int8 rows", bytes.largest),
  };
}

/** The rounding of a range's rows, bound. */
export interface Int8RowsPlan {
  pipeline: GPUComputePipeline;
  bindGroup: GPUBindGroup;
  /** Workgroups of a row. */
  groups: number;
}

/**
 * Compiles and binds the rounding of a range's rows; the layer's input is bound as vectors of 4.
 *
 * @param code {@linkcode int8RowsWgsl} of the matrix's groups
 * @throws FleetError `gpu`
 */
export async function planInt8Rows(
  { gpu, label, matrix, step, input }: LinearOptions,
  rows: Int8Rows,
  code: string,
  range: RowRange,
  uniforms: Uniforms,
): Promise<Int8RowsPlan> {
  invariant(isVectorInput({ input, matrix }), `rows of ${label} begin at fours`);
  const params = uniforms.add(matrix.blocks[0], { row_base: 0, row_cap: 0, range });
  return {
    pipeline: await gpu.pipeline({
      label: `${label} rounding`,
      code,
      bindings: BINDINGS,
    }),
    bindGroup: bindGroup(gpu, `${label} rounding`, BINDINGS, [
      step,
      params,
      input.buffer,
      rows.values,
      rows.largest,
    ]),
    groups: Math.ceil(matrix.k / INT8_WORD_K / THREADS),
  };
}

/** Adds the dispatch for a range's rows to the pass. */
export function encodeInt8Rows(
  pass: GPUComputePassEncoder,
  { pipeline, bindGroup, groups }: Int8RowsPlan,
  rows: number,
): void {
  pass.setPipeline(pipeline);
  pass.setBindGroup(0, bindGroup);
  pass.dispatchWorkgroups(groups, rows);
}

/**
 * The rounding's code: a thread rounds 16 elements; those of a group tell each other the largest in
 * workgroup memory.
 *
 * @param groupK K of a group, 16, 32, 48 or 64
 * @param packed whether `hasPackedDot`
 */
export function int8RowsWgsl(groupK: number, packed: boolean): string {
  const words = groupK / INT8_WORD_K;
  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read_write> values: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> x_largest: array<f32>;
${int8Wgsl(packed)}
var<workgroup> largests: array<u32, ${THREADS}>;

@compute @workgroup_size(${THREADS})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let row = range_start() + workgroup.y;
  let words = params.k / ${INT8_WORD_K}u;
  let word = workgroup.x * ${THREADS}u + lane;
  let at = (params.x_offset + row * params.x_stride) / 4u + min(word, words - 1u) * 4u;
${times(4, (q) => `  let x${q} = x[at + ${q}u];`)}
  largests[lane] = largest_int8(x0, x1, x2, x3);
  workgroupBarrier();
  let group = lane - lane % ${words}u;
  var bits = 0u;
${times(words, (i) => `  bits = max(bits, largests[group + ${i}u]);`)}
  let largest = bitcast<f32>(bits);
  if (word >= words || workgroup.y >= range_rows()) { return; }
  let inverse = inverse_int8(largest);
  values[row * words + word] = vec4<u32>(${
    [0, 1, 2, 3].map((q) => `pack_int8(vec4<f32>(x${q}) * inverse)`).join(", ")
  });
  if (lane == group) { x_largest[(row * words + word) / ${words}u] = largest; }
}
`;
}
