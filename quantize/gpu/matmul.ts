/**
 * Matrix products in float32, batched, with either factor transposed: all heavy arithmetic of
 * calibration and tuning goes through this one kernel.
 *
 * A workgroup of 256 makes a tile of 128 x 128, each thread 8 x 8 of it in registers. The loop over
 * 16 of K is unrolled by generating it (rolled WGSL loops are guarded, and cost two to three times).
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { Operation, Recorder } from "./operation.ts";
import { reduce } from "./rows.ts";

/** A batch of matrices in a buffer of float32, row-major. */
export interface MatrixView {
  buffer: GPUBuffer;
  /** Elements from one row (as stored) to the next. */
  stride: number;
  /** Elements before the first. */
  offset?: number;
  /** Elements from one matrix of the batch to the next. */
  batchStride?: number;
}

/** `c = scale * op(a) op(b) + add`. */
export interface MatmulRequest {
  label: string;
  /** `op(a)` is M x K; with `transposeA` it is stored K x M. */
  a: MatrixView;
  transposeA?: boolean;
  /** `op(b)` is K x N; with `transposeB` it is stored N x K. */
  b: MatrixView;
  transposeB?: boolean;
  c: MatrixView;
  m: number;
  n: number;
  k: number;
  batch?: number;
  scale?: number;
  /** Added to the product; of `c`'s shape and strides, another buffer. `"c"` adds to what is there. */
  add?: GPUBuffer | "c";
}

const TILE = 128, STEP = 16, ROW = TILE / 4 + 1;
/** Workgroups that keep a large GPU busy. */
const WANTED_WORKGROUPS = 264;

/** Where a quad of a tile lies: quads along K of one row, or quads along the tile of one k. */
function loadWgsl(name: "a" | "b", alongK: boolean): string {
  const limit = name === "a" ? "p.m" : "p.n";
  const origin = name === "a" ? "origin_row" : "origin_column";
  if (alongK) {
    return /* wgsl */ `
    for (var part = 0u; part < 2u; part++) {
      let index = lane + part * 256u;
      let at = index / 4u;
      let k = (index % 4u) * 4u;
      var quad = vec4<f32>();
      if (${origin} + at < ${limit} && start + k < p.k) {
        quad = ${name}[${name}_base + ((${origin} + at) * p.stride_${name} + start + k) / 4u];
      }
      tile_${name}[(k + 0u) * ${ROW}u + at / 4u][at % 4u] = quad.x;
      tile_${name}[(k + 1u) * ${ROW}u + at / 4u][at % 4u] = quad.y;
      tile_${name}[(k + 2u) * ${ROW}u + at / 4u][at % 4u] = quad.z;
      tile_${name}[(k + 3u) * ${ROW}u + at / 4u][at % 4u] = quad.w;
    }`;
  }
  return /* wgsl */ `
    for (var part = 0u; part < 2u; part++) {
      let index = lane + part * 256u;
      let k = index / 32u;
      let at = index % 32u;
      var quad = vec4<f32>();
      if (${origin} + at * 4u < ${limit} && start + k < p.k) {
        quad = ${name}[${name}_base + ((start + k) * p.stride_${name} + ${origin}) / 4u + at];
      }
      tile_${name}[k * ${ROW}u + at] = quad;
    }`;
}

function matmulWgsl(transposeA: boolean, transposeB: boolean): string {
  const rows = [0, 1, 2, 3, 4, 5, 6, 7];
  const inner = Array.from({ length: STEP }, (_, k) => `
    a0 = tile_a[${k * ROW}u + ty]; a1 = tile_a[${k * ROW + 16}u + ty];
    b0 = tile_b[${k * ROW}u + tx]; b1 = tile_b[${k * ROW + 16}u + tx];
    ${
    rows.map((r) => {
      const a = `vec4(a${r >> 2}.${"xyzw"[r & 3]})`;
      return `c${r}l = fma(${a}, b0, c${r}l); c${r}r = fma(${a}, b1, c${r}r);`;
    }).join("\n    ")
  }`).join("");
  return /* wgsl */ `
struct Params {
  m: u32, n: u32, k: u32, flags: u32,
  stride_a: u32, stride_b: u32, stride_c: u32, scale: f32,
  offset_a: u32, offset_b: u32, offset_c: u32, unused: u32,
  batch_a: u32, batch_b: u32, batch_c: u32, unused_2: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> addend: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>;

// One quad of padding a row keeps the transposing stores off each other's banks.
var<workgroup> tile_a: array<vec4<f32>, ${STEP * ROW}>;
var<workgroup> tile_b: array<vec4<f32>, ${STEP * ROW}>;

fn put(row: u32, column: u32, batch: u32, product: vec4<f32>) {
  if (row >= p.m || column >= p.n) {
    return;
  }
  let at = (p.offset_c + batch * p.batch_c + row * p.stride_c + column) / 4u;
  var value = product * p.scale;
  if (p.flags == 1u) {
    value += addend[at];
  } else if (p.flags == 2u) {
    value += c[at];
  }
  c[at] = value;
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let origin_column = workgroup.x * ${TILE}u;
  let origin_row = workgroup.y * ${TILE}u;
  let batch = workgroup.z;
  let a_base = (p.offset_a + batch * p.batch_a) / 4u;
  let b_base = (p.offset_b + batch * p.batch_b) / 4u;
  let tx = lane % 16u;
  let ty = lane / 16u;
  ${rows.map((r) => `var c${r}l = vec4<f32>(); var c${r}r = vec4<f32>();`).join("\n  ")}
  var a0: vec4<f32>; var a1: vec4<f32>; var b0: vec4<f32>; var b1: vec4<f32>;
  for (var start = 0u; start < p.k; start += ${STEP}u) {
    ${loadWgsl("a", !transposeA)}
    ${loadWgsl("b", transposeB)}
    workgroupBarrier();
    ${inner}
    workgroupBarrier();
  }
  let row = origin_row + ty * 4u;
  let left = origin_column + tx * 4u;
  ${
    rows.map((r) =>
      `put(row + ${(r >> 2) * 64 + (r & 3)}u, left, batch, c${r}l);
  put(row + ${(r >> 2) * 64 + (r & 3)}u, left + 64u, batch, c${r}r);`
    ).join("\n  ")
  }
}
`;
}

/**
 * Records a product. Sizes, strides and offsets are multiples of 4, because the kernel moves quads.
 *
 * Products with few tiles and a long K (the gradient of a small matrix over many rows) are split
 * along K into partial products, which are added up in order: the same bits every time.
 */
export async function matmul(recorder: Recorder, request: MatmulRequest): Promise<Operation[]> {
  const { m, n, k, batch = 1, a, b, c } = request;
  const tiles = Math.ceil(m / TILE) * Math.ceil(n / TILE) * batch;
  const plain = c.stride === n && !c.offset && typeof request.add !== "object";
  const splits = batch > 1 || !plain
    ? 1
    : Math.min(Math.floor(WANTED_WORKGROUPS / tiles), Math.floor(k / 512), 64);
  const { transposeA = false, transposeB = false } = request;
  const part = splits > 1 ? Math.ceil(k / splits / 64) * 64 : k;
  if (splits <= 1) return [await product(recorder, request)];
  const whole = Math.floor(k / part), rest = k - whole * part;
  const parts = recorder.buffer(`${request.label} parts`, (whole + (rest ? 1 : 0)) * m * n);
  const along = (view: MatrixView, transposed: boolean) => transposed ? view.stride : 1;
  const stepA = along(a, transposeA) * part, stepB = along(b, !transposeB) * part;
  const operations = [
    await product(recorder, {
      ...request,
      add: undefined,
      a: { ...a, batchStride: stepA },
      b: { ...b, batchStride: stepB },
      c: { buffer: parts, stride: n, batchStride: m * n },
      k: part,
      batch: whole,
    }),
  ];
  if (rest) {
    operations.push(
      await product(recorder, {
        ...request,
        add: undefined,
        a: { ...a, offset: (a.offset ?? 0) + whole * stepA },
        b: { ...b, offset: (b.offset ?? 0) + whole * stepB },
        c: { buffer: parts, stride: n, offset: whole * m * n },
        k: rest,
      }),
    );
  }
  const count = whole + (rest ? 1 : 0);
  operations.push(await reduce(recorder, parts, c.buffer, m * n, count, request.add === "c"));
  return operations;
}

function product(recorder: Recorder, request: MatmulRequest): Promise<Operation> {
  const { label, a, b, c, m, n, k, batch = 1, add, transposeA = false, transposeB = false } =
    request;
  const numbers = [
    m,
    n,
    k,
    ...[a, b, c].flatMap((view) => [
      view.stride,
      view.offset ?? 0,
      view.batchStride ?? 0,
    ]),
  ];
  invariant(numbers.every((number) => number % 4 === 0), `${label} is made of quads: ${numbers}`);
  return recorder.dispatch({
    label,
    code: matmulWgsl(transposeA, transposeB),
    constants: [
      ...[m, n, k, add === undefined ? 0 : add === "c" ? 2 : 1],
      ...[a.stride, b.stride, c.stride, { f32: request.scale ?? 1 }],
      ...[a.offset ?? 0, b.offset ?? 0, c.offset ?? 0, 0],
      ...[a.batchStride ?? 0, b.batchStride ?? 0, c.batchStride ?? 0, 0],
    ],
    buffers: [
      a.buffer,
      b.buffer,
      add === undefined || add === "c" ? recorder.unused : add,
      c.buffer,
    ],
    workgroups: [Math.ceil(n / TILE), Math.ceil(m / TILE), batch],
    work: 2 * m * n * k * batch,
  });
}
