/**
 * One transformer layer in float32 over whole sequences: forward, and backward to the gradients of
 * its input, its norms and its matrices. Weights come from outside (float, or dequantized).
 *
 * Backward follows a forward of the same input: it reads what forward left behind. All layers of a
 * model share one such set of buffers; between layers only inputs are kept (activation
 * recomputation, Chen et al. 2016, arXiv 1604.06174).
 *
 * @module
 */
import type { LinearName, ModelConfig } from "../../shared/model_config.ts";
import { ropeAngles } from "../../kernels/transformer/mod.ts";
import HEADS from "./heads.wgsl" with { type: "text" };
import { matmul, type MatmulRequest } from "./matmul.ts";
import { lineWorkgroups, type Operation, type Recorder } from "./operation.ts";
import { normWeightBack, rowwise } from "./rows.ts";

/** Sequences that go through a layer together. */
export interface BlockShape {
  sequences: number;
  /** Of each; a multiple of 4. */
  tokens: number;
}

/** Where a matrix lies in a buffer that it shares with those of the same input. */
export interface MatrixPlace {
  buffer: GPUBuffer;
  gradient: GPUBuffer;
  /** First row. */
  row: number;
  /** Which of {@linkcode Block.inputs} it multiplies. */
  input: BlockInput;
}

/** What the matrices of a layer multiply: normed input, heads' outputs, normed again, gated. */
export const BLOCK_INPUTS = ["attention", "output", "mlp", "down"] as const;
/** One of {@linkcode BLOCK_INPUTS}. */
export type BlockInput = typeof BLOCK_INPUTS[number];

/** A layer's buffers and recorded operations. */
export interface Block {
  rows: number;
  /** `(rows, hidden)`: put the input here. */
  x: GPUBuffer;
  /** `(rows, hidden)`: the output. */
  out: GPUBuffer;
  /** `(rows, hidden)`: put the gradient of the output here; `dx` is that of the input. */
  dout: GPUBuffer;
  dx: GPUBuffer;
  norms: { input: GPUBuffer; post: GPUBuffer };
  normGradients: { input: GPUBuffer; post: GPUBuffer };
  matrices: Record<LinearName, MatrixPlace>;
  /** `(rows, K)` after forward. */
  inputs: Record<BlockInput, { buffer: GPUBuffer; columns: number }>;
  forward: Operation[];
  backward: Operation[];
}

/** Makes a layer's buffers and records it. */
export async function createBlock(
  recorder: Recorder,
  config: ModelConfig,
  { sequences, tokens }: BlockShape,
): Promise<Block> {
  const { hiddenSize: hidden, heads, kvHeads, headDim, ffnSize, rmsNormEps } = config;
  const rows = sequences * tokens;
  const group = heads / kvHeads, wide = heads * headDim, narrow = kvHeads * headDim;
  const qkvColumns = wide + 2 * narrow, batch = sequences * kvHeads;
  const buffer = (label: string, count: number) => recorder.buffer(label, count);
  const pair = (label: string, n: number, k: number) => ({
    w: buffer(label, n * k),
    d: buffer(`${label} gradient`, n * k),
    n,
    k,
  });
  const weights = {
    qkv: pair("q | k | v", qkvColumns, hidden),
    o: pair("o", hidden, wide),
    gateUp: pair("gate | up", 2 * ffnSize, hidden),
    down: pair("down", hidden, ffnSize),
  };
  const act = {
    x: buffer("x", rows * hidden),
    normed: buffer("normed", rows * hidden),
    inverse: buffer("1 / rms", rows),
    qkv: buffer("qkv", rows * qkvColumns),
    q: buffer("queries", rows * wide),
    k: buffer("keys", rows * narrow),
    v: buffer("values", rows * narrow),
    p: buffer("probabilities", batch * tokens * group * tokens),
    o: buffer("heads' outputs, packed", rows * wide),
    attended: buffer("heads' outputs", rows * wide),
    between: buffer("between", rows * hidden),
    normedAgain: buffer("normed again", rows * hidden),
    inverseAgain: buffer("1 / rms again", rows),
    gateUp: buffer("gate | up", rows * 2 * ffnSize),
    gated: buffer("gated", rows * ffnSize),
    out: buffer("out", rows * hidden),
  };
  const grad = {
    out: buffer("d out", rows * hidden),
    x: buffer("d x", rows * hidden),
    gated: buffer("d gated", rows * ffnSize),
    gateUp: buffer("d gate | up", rows * 2 * ffnSize),
    normed: buffer("d normed", rows * hidden),
    attended: buffer("d heads' outputs", rows * wide),
    o: buffer("d heads' outputs, packed", rows * wide),
    p: buffer("d probabilities", batch * tokens * group * tokens),
    q: buffer("d queries", rows * wide),
    k: buffer("d keys", rows * narrow),
    v: buffer("d values", rows * narrow),
    qkv: buffer("d qkv", rows * qkvColumns),
  };
  const norms = { input: buffer("input norm", hidden), post: buffer("post norm", hidden) };
  const normGradients = {
    input: buffer("d input norm", hidden),
    post: buffer("d post norm", hidden),
  };
  const angles = recorder.upload(
    "angles",
    ropeAngles({ headDim, theta: config.ropeTheta, scaling: config.ropeScaling }, tokens),
  );
  const product = (request: MatmulRequest) => matmul(recorder, request);
  type Pair = typeof weights.qkv;
  /** `to = x W' [+ add]` */
  const linear = (label: string, x: GPUBuffer, { w, n, k }: Pair, to: GPUBuffer, add?: GPUBuffer) =>
    product({
      label,
      a: { buffer: x, stride: k },
      b: { buffer: w, stride: k },
      transposeB: true,
      c: { buffer: to, stride: n },
      m: rows,
      n,
      k,
      add,
    });
  /** `dx = dy W` and `dW = dy' x` */
  const linearBack = async (
    label: string,
    x: GPUBuffer,
    { w, d, n, k }: Pair,
    dy: GPUBuffer,
    dx: GPUBuffer,
  ) => [
    ...await product({
      label: `d ${label}`,
      a: { buffer: dy, stride: n },
      b: { buffer: w, stride: k },
      c: { buffer: dx, stride: k },
      m: rows,
      n: k,
      k: n,
    }),
    ...await product({
      label: `d ${label} weights`,
      a: { buffer: dy, stride: n },
      transposeA: true,
      b: { buffer: x, stride: k },
      c: { buffer: d, stride: k },
      m: n,
      n: k,
      k: rows,
    }),
  ];
  const packHeads = (entryPoint: string, buffers: GPUBuffer[], bindings: number[], count: number) =>
    recorder.dispatch({
      label: entryPoint,
      code: HEADS,
      entryPoint,
      constants: [tokens, sequences, kvHeads, group, headDim],
      buffers,
      bindings,
      workgroups: lineWorkgroups(count),
    });
  // Views of packed heads, as batches of matrices.
  const perHead = (tensor: GPUBuffer, rowsOf: number, stride = headDim) => ({
    buffer: tensor,
    stride,
    batchStride: rowsOf * stride,
  });
  const many = tokens * group, scale = 1 / Math.sqrt(headDim);
  const query = (tensor: GPUBuffer) => perHead(tensor, many);
  const key = (tensor: GPUBuffer) => perHead(tensor, tokens);
  const score = (tensor: GPUBuffer) => perHead(tensor, many, tokens);
  const scoresShape = { m: many, n: tokens, k: headDim, batch };
  const queryShape = { m: many, n: headDim, k: tokens, batch };
  const keyShape = { m: tokens, n: headDim, k: many, batch };
  const norm = (x: GPUBuffer, weight: GPUBuffer, to: GPUBuffer, inverse: GPUBuffer) =>
    rowwise(recorder, "norm", [x, weight, to, inverse], {
      rows,
      columns: hidden,
      value: rmsNormEps,
    });
  const perSequence = { workgroups: [many, batch] as const, rows: many, columns: tokens };

  const forward = [
    await norm(act.x, norms.input, act.normed, act.inverse),
    ...await linear("qkv", act.normed, weights.qkv, act.qkv),
    await packHeads(
      "pack",
      [angles, act.qkv, act.q, act.k, act.v],
      [1, 2, 3, 4, 5],
      rows * qkvColumns / 2,
    ),
    ...await product({
      label: "scores",
      a: query(act.q),
      b: key(act.k),
      transposeB: true,
      c: score(act.p),
      scale,
      ...scoresShape,
    }),
    await rowwise(recorder, "softmax", [act.p], { ...perSequence, extra: group }),
    ...await product({
      label: "attend",
      a: score(act.p),
      b: key(act.v),
      c: query(act.o),
      ...queryShape,
    }),
    await packHeads("unpack", [act.attended, act.o], [2, 3], rows * wide),
    ...await linear("o", act.attended, weights.o, act.between, act.x),
    await norm(act.between, norms.post, act.normedAgain, act.inverseAgain),
    ...await linear("gate | up", act.normedAgain, weights.gateUp, act.gateUp),
    await rowwise(recorder, "swiglu", [act.gateUp, act.gated], { rows, columns: ffnSize }),
    ...await linear("down", act.gated, weights.down, act.out, act.between),
  ];
  const normBack = async (
    x: GPUBuffer,
    which: "input" | "post",
    inverse: GPUBuffer,
  ) => [
    await rowwise(recorder, "norm_back", [x, norms[which], grad.normed, grad.x, inverse], {
      rows,
      columns: hidden,
    }),
    ...await normWeightBack(
      recorder,
      { x, gradient: grad.normed, inverse, out: normGradients[which] },
      rows,
      hidden,
    ),
  ];
  const backward = [
    ...await linearBack("down", act.gated, weights.down, grad.out, grad.gated),
    await rowwise(recorder, "swiglu_back", [act.gateUp, grad.gated, grad.gateUp], {
      rows,
      columns: ffnSize,
    }),
    ...await linearBack("gate | up", act.normedAgain, weights.gateUp, grad.gateUp, grad.normed),
    // The residual passes the gradient on; norms add to it.
    recorder.copy(grad.out, grad.x, rows * hidden),
    ...await normBack(act.between, "post", act.inverseAgain),
    ...await linearBack("o", act.attended, weights.o, grad.x, grad.attended),
    await packHeads("unpack_back", [grad.attended, grad.o], [2, 3], rows * wide),
    ...await product({
      label: "d probabilities",
      a: query(grad.o),
      b: key(act.v),
      transposeB: true,
      c: score(grad.p),
      ...scoresShape,
    }),
    ...await product({
      label: "d values",
      a: score(act.p),
      transposeA: true,
      b: query(grad.o),
      c: key(grad.v),
      ...keyShape,
    }),
    await rowwise(recorder, "softmax_back", [act.p, grad.p], perSequence),
    ...await product({
      label: "d queries",
      a: score(grad.p),
      b: key(act.k),
      c: query(grad.q),
      scale,
      ...queryShape,
    }),
    ...await product({
      label: "d keys",
      a: score(grad.p),
      transposeA: true,
      b: query(act.q),
      c: key(grad.k),
      scale,
      ...keyShape,
    }),
    await packHeads(
      "pack_back",
      [angles, grad.qkv, grad.q, grad.k, grad.v],
      [1, 2, 3, 4, 5],
      rows * qkvColumns / 2,
    ),
    ...await linearBack("qkv", act.normed, weights.qkv, grad.qkv, grad.normed),
    ...await normBack(act.x, "input", act.inverse),
  ];
  const place = ({ w, d }: Pair, row: number, input: BlockInput): MatrixPlace => ({
    buffer: w,
    gradient: d,
    row,
    input,
  });
  return {
    rows,
    x: act.x,
    out: act.out,
    dout: grad.out,
    dx: grad.x,
    norms,
    normGradients,
    matrices: {
      "self_attn.q_proj": place(weights.qkv, 0, "attention"),
      "self_attn.k_proj": place(weights.qkv, wide, "attention"),
      "self_attn.v_proj": place(weights.qkv, wide + narrow, "attention"),
      "self_attn.o_proj": place(weights.o, 0, "output"),
      "mlp.gate_proj": place(weights.gateUp, 0, "mlp"),
      "mlp.up_proj": place(weights.gateUp, ffnSize, "mlp"),
      "mlp.down_proj": place(weights.down, 0, "down"),
    },
    inputs: {
      attention: { buffer: act.normed, columns: hidden },
      output: { buffer: act.attended, columns: wide },
      mlp: { buffer: act.normedAgain, columns: hidden },
      down: { buffer: act.gated, columns: ffnSize },
    },
    forward,
    backward,
  };
}
