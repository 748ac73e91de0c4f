/**
 * One transformer layer in float32 over whole sequences, forward. Weights come from outside (float,
 * or dequantized).
 *
 * @module
 */
import type { LinearName, ModelConfig } from "../../shared/model_config.ts";
import { ropeAngles } from "../../kernels/transformer/mod.ts";
import HEADS from "./heads.wgsl" with { type: "text" };
import { matmul, type MatmulRequest } from "./matmul.ts";
import { lineWorkgroups, type Operation, type Recorder } from "./operation.ts";
import { rowwise } from "./rows.ts";

/** Sequences that go through a layer together. */
export interface BlockShape {
  sequences: number;
  /** Of each; a multiple of 4. */
  tokens: number;
}

/** Where a matrix lies in a buffer that it shares with those of the same input. */
export interface MatrixPlace {
  buffer: GPUBuffer;
  /** First row. */
  row: number;
}

/** What the matrices of a layer multiply: normed input, heads' outputs, normed again, gated. */
export const BLOCK_INPUTS = ["attention", "output", "mlp", "down"] as const;
/** One of {@linkcode BLOCK_INPUTS}. */
export type BlockInput = typeof BLOCK_INPUTS[number];

/** Which input each matrix multiplies. */
export const MATRIX_INPUTS: Record<LinearName, BlockInput> = {
  "self_attn.q_proj": "attention",
  "self_attn.k_proj": "attention",
  "self_attn.v_proj": "attention",
  "self_attn.o_proj": "output",
  "mlp.gate_proj": "mlp",
  "mlp.up_proj": "mlp",
  "mlp.down_proj": "down",
};

/** A layer's buffers and recorded forward. */
export interface Block {
  rows: number;
  /** `(rows, hidden)`: put the input here. */
  x: GPUBuffer;
  /** `(rows, hidden)`: the output. */
  out: GPUBuffer;
  norms: { input: GPUBuffer; post: GPUBuffer };
  matrices: Record<LinearName, MatrixPlace>;
  /** `(rows, K)` after forward. */
  inputs: Record<BlockInput, { buffer: GPUBuffer; columns: number }>;
  forward: Operation[];
}

/** Matrices of one input, one below the other: `(n, k)`. */
export interface Stacked {
  label: string;
  buffer: GPUBuffer;
  n: number;
  k: number;
}

/** A recorded forward, and what a backward of it needs. */
export interface Forward {
  block: Block;
  weights: Record<"qkv" | "o" | "gateUp" | "down", Stacked>;
  /** What the forward leaves behind. */
  act: Record<
    | ("x" | "normed" | "inverse" | "q" | "k" | "v" | "p" | "attended")
    | ("between" | "normedAgain" | "inverseAgain" | "gateUp" | "gated"),
    GPUBuffer
  >;
  attention: AttentionShape;
  /** Between rows and packed heads (`heads.wgsl`); bindings 1 to 5 are angles, rows, q, k, v. */
  packHeads(
    entryPoint: string,
    buffers: GPUBuffer[],
    bindings: number[],
    threads: number,
  ): Promise<Operation>;
  angles: GPUBuffer;
}

/** Makes a layer's buffers and records its forward. */
export async function createForward(
  recorder: Recorder,
  config: ModelConfig,
  shape: BlockShape,
): Promise<Block> {
  return (await recordForward(recorder, config, shape)).block;
}

/** Heads of a KV head packed together, so that attention is a batch of plain products. */
export type AttentionShape = ReturnType<typeof attentionShape>;

function attentionShape(
  { heads, kvHeads, headDim }: ModelConfig,
  { sequences, tokens }: BlockShape,
) {
  const group = heads / kvHeads, batch = sequences * kvHeads, many = tokens * group;
  const perHead = (buffer: GPUBuffer, rows: number, stride = headDim) => ({
    buffer,
    stride,
    batchStride: rows * stride,
  });
  return {
    group,
    batch,
    many,
    scale: 1 / Math.sqrt(headDim),
    // Views of packed heads, as batches of matrices.
    query: (tensor: GPUBuffer) => perHead(tensor, many),
    key: (tensor: GPUBuffer) => perHead(tensor, tokens),
    score: (tensor: GPUBuffer) => perHead(tensor, many, tokens),
    scores: { m: many, n: tokens, k: headDim, batch },
    queries: { m: many, n: headDim, k: tokens, batch },
    keys: { m: tokens, n: headDim, k: many, batch },
    rowwise: { workgroups: [many, batch] as const, rows: many, columns: tokens },
  };
}

/** As {@linkcode createForward}, with what a backward of it needs. */
export async function recordForward(
  recorder: Recorder,
  config: ModelConfig,
  shape: BlockShape,
): Promise<Forward> {
  const { hiddenSize: hidden, heads, kvHeads, headDim, ffnSize, rmsNormEps } = config;
  const { sequences, tokens } = shape, rows = sequences * tokens;
  const wide = heads * headDim, narrow = kvHeads * headDim, qkvColumns = wide + 2 * narrow;
  const buffer = (label: string, count: number) => recorder.buffer(label, count);
  const stacked = (label: string, n: number, k: number): Stacked => ({
    label,
    buffer: buffer(label, n * k),
    n,
    k,
  });
  const weights = {
    qkv: stacked("q | k | v", qkvColumns, hidden),
    o: stacked("o", hidden, wide),
    gateUp: stacked("gate | up", 2 * ffnSize, hidden),
    down: stacked("down", hidden, ffnSize),
  };
  const attention = attentionShape(config, shape);
  const { group, batch, many, query, key, score } = attention;
  const act = {
    x: buffer("x", rows * hidden),
    normed: buffer("normed", rows * hidden),
    inverse: buffer("1 / rms", rows),
    qkv: buffer("qkv", rows * qkvColumns),
    q: buffer("queries", rows * wide),
    k: buffer("keys", rows * narrow),
    v: buffer("values", rows * narrow),
    p: buffer("probabilities", batch * many * tokens),
    o: buffer("heads' outputs, packed", rows * wide),
    attended: buffer("heads' outputs", rows * wide),
    between: buffer("between", rows * hidden),
    normedAgain: buffer("normed again", rows * hidden),
    inverseAgain: buffer("1 / rms again", rows),
    gateUp: buffer("gate | up", rows * 2 * ffnSize),
    gated: buffer("gated", rows * ffnSize),
    out: buffer("out", rows * hidden),
  };
  const norms = { input: buffer("input norm", hidden), post: buffer("post norm", hidden) };
  const angles = recorder.upload(
    "angles",
    ropeAngles({ headDim, theta: config.ropeTheta, scaling: config.ropeScaling }, tokens),
  );
  const product = (request: MatmulRequest) => matmul(recorder, request);
  /** `to = x W' [+ add]` */
  const linear = (x: GPUBuffer, { label, buffer, n, k }: Stacked, to: GPUBuffer, add?: GPUBuffer) =>
    product({
      label,
      a: { buffer: x, stride: k },
      b: { buffer, stride: k },
      transposeB: true,
      c: { buffer: to, stride: n },
      m: rows,
      n,
      k,
      add,
    });
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
  const norm = (x: GPUBuffer, weight: GPUBuffer, to: GPUBuffer, inverse: GPUBuffer) =>
    rowwise(recorder, "norm", [x, weight, to, inverse], {
      rows,
      columns: hidden,
      value: rmsNormEps,
    });
  const forward = [
    await norm(act.x, norms.input, act.normed, act.inverse),
    ...await linear(act.normed, weights.qkv, act.qkv),
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
      scale: attention.scale,
      ...attention.scores,
    }),
    await rowwise(recorder, "softmax", [act.p], { ...attention.rowwise, extra: group }),
    ...await product({
      label: "attend",
      a: score(act.p),
      b: key(act.v),
      c: query(act.o),
      ...attention.queries,
    }),
    await packHeads("unpack", [act.attended, act.o], [2, 3], rows * wide),
    ...await linear(act.attended, weights.o, act.between, act.x),
    await norm(act.between, norms.post, act.normedAgain, act.inverseAgain),
    ...await linear(act.normedAgain, weights.gateUp, act.gateUp),
    await rowwise(recorder, "swiglu", [act.gateUp, act.gated], { rows, columns: ffnSize }),
    ...await linear(act.gated, weights.down, act.out, act.between),
  ];
  const place = ({ buffer }: Stacked, row = 0): MatrixPlace => ({ buffer, row });
  const block: Block = {
    rows,
    x: act.x,
    out: act.out,
    norms,
    matrices: {
      "self_attn.q_proj": place(weights.qkv),
      "self_attn.k_proj": place(weights.qkv, wide),
      "self_attn.v_proj": place(weights.qkv, wide + narrow),
      "self_attn.o_proj": place(weights.o),
      "mlp.gate_proj": place(weights.gateUp),
      "mlp.up_proj": place(weights.gateUp, ffnSize),
      "mlp.down_proj": place(weights.down),
    },
    inputs: {
      attention: { buffer: act.normed, columns: hidden },
      output: { buffer: act.attended, columns: wide },
      mlp: { buffer: act.normedAgain, columns: hidden },
      down: { buffer: act.gated, columns: ffnSize },
    },
    forward,
  };
  return { block, weights, act, attention, packHeads, angles };
}
