/**
 * WGSL of what happens to pairs of columns behind a linear layer: RoPE with the cache's write, and
 * SwiGLU. Each is one function, used by a kernel of its own over stored rows, and by the linear layer
 * that sums decode rows (`PairFinish`), which so spares a pass over memory and a dispatch.
 *
 * Pairs are taken by fours, as vectors, where halves are a multiple of 4; else one by one, which only
 * kernels of their own do. Nothing is left to a compiler that could round a pair unlike another
 * kernel's: multiply-adds are explicit.
 *
 * @module
 */
import type { PairFinish } from "../linear/types.ts";
import type { StepInputs } from "./inputs.ts";
import { TRANSFORMER_TYPES_WGSL, transformerWgsl } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

/** The first binding that the functions' buffers have in a kernel of its own. */
const OWN_BINDING = 2;

/** Pairs that a thread takes. */
type PairLanes = 1 | 4;

/** Pairs that a thread of a kernel of its own takes, by the columns between the two of a pair. */
export function pairLanes(half: number): PairLanes {
  return half % 4 === 0 ? 4 : 1;
}

/** WGSL of a number of each pair: `Floats`, and `Halves` as they are stored. */
const laneTypes = (lanes: PairLanes) => /* wgsl */ `
const LANES = ${lanes}u;
alias Floats = ${lanes === 1 ? "f32" : "vec4<f32>"};
alias Halves = ${lanes === 1 ? "f16" : "vec4<f16>"};
fn to_half(value: Floats) -> Halves {
  return ${lanes === 1 ? "to_f16" : "to_f16x4"}(value);
}
`;

/**
 * Rotary position embedding (Su et al. 2021; rotate-half, as Hugging Face checkpoints have it) of
 * queries and keys; keys and values go into the cache. A pair is elements i and i + head_dim/2 of one
 * head of one row.
 *
 * Keys lie (page, kv head, dim/4, position, 4) and values (page, kv head, position, dim): attention
 * reads keys with a lane per position and values with a lane per dimension, both without gaps. Their
 * dim is padded to a multiple of 4; the padding stays zero as it was made.
 */
function ropeWgsl(
  { heads, kvHeads, headDim, paddedDim }: HeadShape,
  binding: number,
  lanes: PairLanes,
): string {
  // Cosine, sine of a pair, or of two.
  const angles = lanes === 1
    ? /* wgsl */ `
  let cosine = angles[angle].x;
  let sine = angles[angle].y;`
    : /* wgsl */ `
  let low = angles[angle / 2u];
  let high = angles[angle / 2u + 1u];
  let cosine = vec4<f32>(low.xz, high.xz);
  let sine = vec4<f32>(low.yw, high.yw);`;
  return /* wgsl */ `${laneTypes(lanes)}
const HEADS = ${heads}u;
const KV_HEADS = ${kvHeads}u;
const HALF = ${headDim / 2}u;
const PADDED_DIM = ${paddedDim}u;

@group(0) @binding(${binding}) var<storage, read> rows: array<Row>;
@group(0) @binding(${binding + 1}) var<storage, read> page_tables: array<u32>;
// (position, HALF): cos, sin
@group(0) @binding(${binding + 2}) var<storage, read> angles: array<vec${lanes === 1 ? 2 : 4}<f32>>;
@group(0) @binding(${binding + 3}) var<storage, read_write> keys: array<Halves>;
@group(0) @binding(${binding + 4}) var<storage, read_write> values: array<Halves>;

struct Pairs { first: Floats, second: Floats }

// Where the elements from dim on stand.
fn key_index(page: u32, kv_head: u32, slot: u32, dim: u32) -> u32 {
  let quad = (page * KV_HEADS + kv_head) * (PADDED_DIM / 4u) + dim / 4u;
  return (quad * PAGE_TOKENS + slot) * (4u / LANES) + dim % 4u / LANES;
}

fn value_index(page: u32, kv_head: u32, slot: u32, dim: u32) -> u32 {
  return (((page * KV_HEADS + kv_head) * PAGE_TOKENS + slot) * PADDED_DIM + dim) / LANES;
}

// Keys and values into the cache; queries' pairs, turned, are returned for the caller to store.
fn rope(row_index: u32, head: u32, dim: u32, pairs: Pairs) -> Pairs {
  let row = rows[row_index];
  let angle = row.position * HALF + dim;${angles}
  let turned = Pairs(
    fma(-pairs.second, sine, pairs.first * cosine),
    fma(pairs.first, sine, pairs.second * cosine),
  );
  if (head >= HEADS) {
    let page = page_tables[row.page_table + row.position / PAGE_TOKENS];
    let slot = row.position % PAGE_TOKENS;
    if (head < HEADS + KV_HEADS) {
      keys[key_index(page, head - HEADS, slot, dim)] = to_half(turned.first);
      keys[key_index(page, head - HEADS, slot, dim + HALF)] = to_half(turned.second);
    } else {
      let kv_head = head - HEADS - KV_HEADS;
      values[value_index(page, kv_head, slot, dim)] = to_half(pairs.first);
      values[value_index(page, kv_head, slot, dim + HALF)] = to_half(pairs.second);
    }
  }
  return turned;
}
`;
}

/** SwiGLU (Shazeer 2020): silu(gate) * up, float32 -> float16; a pair is a gate and its up. */
function swigluWgsl(width: number, binding: number, lanes: PairLanes): string {
  return /* wgsl */ `${laneTypes(lanes)}
const WIDTH = ${width}u;

@group(0) @binding(${binding}) var<storage, read_write> gated: array<Halves>; // (rows, WIDTH)

fn swiglu(row: u32, column: u32, gate: Floats, up: Floats) {
  // exp of less than -80 changes no bit of the sum, of more than 80 would leave float32's range.
  let silu = gate / (Floats(1.0) + exp(clamp(-gate, Floats(-80.0), Floats(80.0))));
  gated[(row * WIDTH + column) / LANES] = to_half(silu * up);
}
`;
}

/** A kernel of its own: a thread per {@linkcode pairLanes} of each row, or of each prefill row. */
export function ropeKernelWgsl(shape: HeadShape, rows: "all" | "prefill"): string {
  return transformerWgsl(/* wgsl */ `
${ropeWgsl(shape, OWN_BINDING, pairLanes(shape.headDim / 2))}
@group(0) @binding(0) var<uniform> step: Step;
// (rows, (heads + 2 kv_heads) head_dim)
@group(0) @binding(1) var<storage, read_write> qkv: array<Floats>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let head = id.x / (HALF / LANES);
  let dim = id.x % (HALF / LANES) * LANES;
  let row = id.y + ${firstRow(rows)};
  if (row >= step.rows || head >= HEADS + 2u * KV_HEADS) {
    return;
  }
  let at = ((row * (HEADS + 2u * KV_HEADS) + head) * 2u * HALF + dim) / LANES;
  let turned = rope(row, head, dim, Pairs(qkv[at], qkv[at + HALF / LANES]));
  if (head < HEADS) {
    qkv[at] = turned.first;
    qkv[at + HALF / LANES] = turned.second;
  }
}
`);
}

/** A kernel of its own: a thread per {@linkcode pairLanes} of each row, or of each prefill row. */
export function swigluKernelWgsl(width: number, rows: "all" | "prefill"): string {
  return transformerWgsl(/* wgsl */ `
${swigluWgsl(width, OWN_BINDING, pairLanes(width))}
@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> gate_up: array<Floats>; // (rows, 2 width): gate, then up

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let row = id.y + ${firstRow(rows)};
  let column = id.x * LANES;
  if (row >= step.rows || column >= WIDTH) {
    return;
  }
  let at = (row * 2u * WIDTH + column) / LANES;
  swiglu(row, column, gate_up[at], gate_up[at + WIDTH / LANES]);
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
    code: (firstBinding) =>
      /* wgsl */ `${TRANSFORMER_TYPES_WGSL}
${ropeWgsl(shape, firstBinding, 4)}
fn finish(row: u32, n: u32, first: vec4<f32>, second: vec4<f32>) {
  let head = n / (2u * HALF);
  let turned = rope(row, head, n % (2u * HALF), Pairs(first, second));
  if (head < HEADS) {
    put_quad(row, n, turned.first);
    put_quad(row, n + HALF, turned.second);
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
    code: (firstBinding) =>
      /* wgsl */ `${TRANSFORMER_TYPES_WGSL}
${swigluWgsl(width, firstBinding, 4)}
fn finish(row: u32, n: u32, first: vec4<f32>, second: vec4<f32>) {
  swiglu(row, n, first, second);
}
`,
  };
}
