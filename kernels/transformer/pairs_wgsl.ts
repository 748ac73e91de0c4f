/**
 * WGSL of what happens to pairs of columns behind a linear layer: RoPE with the cache's write, and
 * SwiGLU. Each is one function, used by a kernel of its own over stored rows, and by the linear layer
 * that sums decode rows (`PairFinish`), which so spares a pass over memory and a dispatch.
 *
 * @module
 */
import type { PairFinish } from "../linear/types.ts";
import type { StepInputs } from "./inputs.ts";
import { TRANSFORMER_TYPES_WGSL, transformerWgsl } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

/** Bindings that the functions' buffers have in a kernel of its own, and behind a linear layer. */
const OWN_BINDING = 2;
const FINISH_BINDING = 4;

/**
 * Rotary position embedding (Su et al. 2021; rotate-half, as Hugging Face checkpoints have it) of
 * queries and keys; keys and values go into the cache. A pair is elements i and i + head_dim/2 of one
 * head of one row.
 *
 * Keys lie (page, kv head, dim/4, position, 4) and values (page, kv head, position, dim): attention
 * reads keys with a lane per position and values with a lane per dimension, both without gaps. Their
 * dim is padded to a multiple of 4; the padding stays zero as it was made.
 */
function ropeWgsl({ heads, kvHeads, headDim, paddedDim }: HeadShape, binding: number): string {
  return /* wgsl */ `
const HEADS = ${heads}u;
const KV_HEADS = ${kvHeads}u;
const HALF = ${headDim / 2}u;
const PADDED_DIM = ${paddedDim}u;

@group(0) @binding(${binding}) var<storage, read> rows: array<Row>;
@group(0) @binding(${binding + 1}) var<storage, read> page_tables: array<u32>;
@group(0) @binding(${
    binding + 2
  }) var<storage, read> angles: array<vec2<f32>>; // (position, HALF): cos, sin
@group(0) @binding(${binding + 3}) var<storage, read_write> keys: array<f16>;
@group(0) @binding(${binding + 4}) var<storage, read_write> values: array<f16>;

fn key_index(page: u32, kv_head: u32, slot: u32, dim: u32) -> u32 {
  let quad = (page * KV_HEADS + kv_head) * (PADDED_DIM / 4u) + dim / 4u;
  return (quad * PAGE_TOKENS + slot) * 4u + dim % 4u;
}

fn value_index(page: u32, kv_head: u32, slot: u32, dim: u32) -> u32 {
  return ((page * KV_HEADS + kv_head) * PAGE_TOKENS + slot) * PADDED_DIM + dim;
}

// Keys and values into the cache; a query's pair, turned, is returned for the caller to store.
fn rope(row_index: u32, head: u32, dim: u32, pair: vec2<f32>) -> vec2<f32> {
  let row = rows[row_index];
  let angle = angles[row.position * HALF + dim];
  let turned = vec2<f32>(
    pair.x * angle.x - pair.y * angle.y,
    pair.y * angle.x + pair.x * angle.y,
  );
  if (head >= HEADS) {
    let page = page_tables[row.page_table + row.position / PAGE_TOKENS];
    let slot = row.position % PAGE_TOKENS;
    if (head < HEADS + KV_HEADS) {
      keys[key_index(page, head - HEADS, slot, dim)] = to_f16(turned.x);
      keys[key_index(page, head - HEADS, slot, dim + HALF)] = to_f16(turned.y);
    } else {
      values[value_index(page, head - HEADS - KV_HEADS, slot, dim)] = to_f16(pair.x);
      values[value_index(page, head - HEADS - KV_HEADS, slot, dim + HALF)] = to_f16(pair.y);
    }
  }
  return turned;
}
`;
}

/** SwiGLU (Shazeer 2020): silu(gate) * up, float32 -> float16; a pair is a gate and its up. */
function swigluWgsl(width: number, binding: number): string {
  return /* wgsl */ `
const WIDTH = ${width}u;

@group(0) @binding(${binding}) var<storage, read_write> gated: array<f16>; // (rows, WIDTH)

fn swiglu(row: u32, column: u32, pair: vec2<f32>) {
  // exp of less than -80 changes no bit of the sum, of more than 80 would leave float32's range.
  let silu = pair.x / (1.0 + exp(clamp(-pair.x, -80.0, 80.0)));
  gated[row * WIDTH + column] = to_f16(silu * pair.y);
}
`;
}

/** A kernel of its own: a thread per pair of each row, or of each prefill row. */
export function ropeKernelWgsl(shape: HeadShape, rows: "all" | "prefill"): string {
  return transformerWgsl(/* wgsl */ `
@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read_write> qkv: array<f32>; // (rows, (heads + 2 kv_heads) head_dim)
${ropeWgsl(shape, OWN_BINDING)}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let head = id.x / HALF;
  let dim = id.x % HALF;
  let row = id.y + ${firstRow(rows)};
  if (row >= step.rows || head >= HEADS + 2u * KV_HEADS) {
    return;
  }
  let at = (row * (HEADS + 2u * KV_HEADS) + head) * 2u * HALF + dim;
  let turned = rope(row, head, dim, vec2<f32>(qkv[at], qkv[at + HALF]));
  if (head < HEADS) {
    qkv[at] = turned.x;
    qkv[at + HALF] = turned.y;
  }
}
`);
}

/** A kernel of its own: a thread per column of each row, or of each prefill row. */
export function swigluKernelWgsl(width: number, rows: "all" | "prefill"): string {
  return transformerWgsl(/* wgsl */ `
@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> gate_up: array<f32>; // (rows, 2 width): gate, then up
${swigluWgsl(width, OWN_BINDING)}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let row = id.y + ${firstRow(rows)};
  if (row >= step.rows || id.x >= WIDTH) {
    return;
  }
  let at = row * 2u * WIDTH + id.x;
  swiglu(row, id.x, vec2<f32>(gate_up[at], gate_up[at + WIDTH]));
}
`);
}

const firstRow = (rows: "all" | "prefill") => rows === "all" ? "0u" : "step.decode_rows";

/**
 * RoPE and the cache's write behind the projection to q | k | v.
 *
 * @param buffers `angles`, `keys` and `values` as for `createRope`
 */
export function ropeFinish(
  shape: HeadShape,
  inputs: StepInputs,
  buffers: { angles: GPUBuffer; keys: GPUBuffer; values: GPUBuffer },
): PairFinish {
  return {
    half: shape.headDim / 2,
    bindings: ["read", "read", "read", "write", "write"],
    buffers: [inputs.rows, inputs.pageTables, buffers.angles, buffers.keys, buffers.values],
    code: /* wgsl */ `${TRANSFORMER_TYPES_WGSL}
${ropeWgsl(shape, FINISH_BINDING)}
fn finish(row: u32, n: u32, pair: vec2<f32>) {
  let head = n / (2u * HALF);
  let turned = rope(row, head, n % (2u * HALF), pair);
  if (head < HEADS) {
    put(row, n, turned.x);
    put(row, n + HALF, turned.y);
  }
}
`,
  };
}

/**
 * SwiGLU behind the projection to gate | up.
 *
 * @param gated float16, `(rows, width)`
 */
export function swigluFinish(width: number, gated: GPUBuffer): PairFinish {
  return {
    half: width,
    bindings: ["write"],
    buffers: [gated],
    code: /* wgsl */ `${TRANSFORMER_TYPES_WGSL}
${swigluWgsl(width, FINISH_BINDING)}
fn finish(row: u32, n: u32, pair: vec2<f32>) {
  swiglu(row, n, pair);
}
`,
  };
}
