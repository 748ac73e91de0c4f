/**
 * One transformer layer in float32 over whole sequences, forward and backward to the gradients of
 * its input, its norms and its matrices.
 *
 * Backward follows a forward of the same input: it reads what forward left behind. All layers of a
 * model share one such set of buffers; between layers only inputs are kept (activation
 * recomputation, Chen et al. 2016, arXiv 1604.06174).
 *
 * @module
 */
import type { LinearName, ModelConfig } from "../../shared/model_config.ts";
import { type Block, type BlockShape, recordForward, type Stacked } from "./forward.ts";
import { matmul, type MatmulRequest } from "./matmul.ts";
import type { Operation, Recorder } from "./operation.ts";
import { normWeightBack, rowwise } from "./rows.ts";

export type { BlockShape } from "./forward.ts";

/** A layer that gradients go back through. */
export interface TunableBlock extends Block {
  /** `(rows, hidden)`: put the gradient of the output here; `dx` is that of the input. */
  dout: GPUBuffer;
  dx: GPUBuffer;
  normGradients: { input: GPUBuffer; post: GPUBuffer };
  /** Each matrix's, in a buffer laid out as that of the weights. */
  gradients: Record<LinearName, GPUBuffer>;
  backward: Operation[];
}

/** Makes a layer's buffers and records it both ways. */
export async function createBlock(
  recorder: Recorder,
  config: ModelConfig,
  shape: BlockShape,
): Promise<TunableBlock> {
  const { block, weights, act, attention, packHeads, angles } = await recordForward(
    recorder,
    config,
    shape,
  );
  const { hiddenSize: hidden, heads, kvHeads, headDim, ffnSize } = config;
  const { rows, norms } = block, { tokens } = shape;
  const wide = heads * headDim, narrow = kvHeads * headDim, qkvColumns = wide + 2 * narrow;
  const { batch, many, scale, query, key, score } = attention;
  const buffer = (label: string, count: number) => recorder.buffer(label, count);
  const ofWeights = ({ label, n, k }: Stacked) => buffer(`d ${label} weights`, n * k);
  const grad = {
    out: buffer("d out", rows * hidden),
    x: buffer("d x", rows * hidden),
    gated: buffer("d gated", rows * ffnSize),
    gateUp: buffer("d gate | up", rows * 2 * ffnSize),
    normed: buffer("d normed", rows * hidden),
    attended: buffer("d heads' outputs", rows * wide),
    o: buffer("d heads' outputs, packed", rows * wide),
    p: buffer("d probabilities", batch * many * tokens),
    q: buffer("d queries", rows * wide),
    k: buffer("d keys", rows * narrow),
    v: buffer("d values", rows * narrow),
    qkv: buffer("d qkv", rows * qkvColumns),
    weights: {
      qkv: ofWeights(weights.qkv),
      o: ofWeights(weights.o),
      gateUp: ofWeights(weights.gateUp),
      down: ofWeights(weights.down),
    },
  };
  const normGradients = {
    input: buffer("d input norm", hidden),
    post: buffer("d post norm", hidden),
  };
  const product = (request: MatmulRequest) => matmul(recorder, request);
  /** `dx = dy W` and `dW = dy' x` */
  const linearBack = async (
    which: keyof typeof weights,
    x: GPUBuffer,
    dy: GPUBuffer,
    dx: GPUBuffer,
  ) => {
    const { label, buffer, n, k } = weights[which];
    return [
      ...await product({
        label: `d ${label}`,
        a: { buffer: dy, stride: n },
        b: { buffer, stride: k },
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
        c: { buffer: grad.weights[which], stride: k },
        m: n,
        n: k,
        k: rows,
      }),
    ];
  };
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
    ...await linearBack("down", act.gated, grad.out, grad.gated),
    await rowwise(recorder, "swiglu_back", [act.gateUp, grad.gated, grad.gateUp], {
      rows,
      columns: ffnSize,
    }),
    ...await linearBack("gateUp", act.normedAgain, grad.gateUp, grad.normed),
    // The residual passes the gradient on; norms add to it.
    recorder.copy(grad.out, grad.x, rows * hidden),
    ...await normBack(act.between, "post", act.inverseAgain),
    ...await linearBack("o", act.attended, grad.x, grad.attended),
    await packHeads("unpack_back", [grad.attended, grad.o], [2, 3], rows * wide),
    ...await product({
      label: "d probabilities",
      a: query(grad.o),
      b: key(act.v),
      transposeB: true,
      c: score(grad.p),
      ...attention.scores,
    }),
    ...await product({
      label: "d values",
      a: score(act.p),
      transposeA: true,
      b: query(grad.o),
      c: key(grad.v),
      ...attention.keys,
    }),
    await rowwise(recorder, "softmax_back", [act.p, grad.p], attention.rowwise),
    ...await product({
      label: "d queries",
      a: score(grad.p),
      b: key(act.k),
      c: query(grad.q),
      scale,
      ...attention.queries,
    }),
    ...await product({
      label: "d keys",
      a: score(grad.p),
      transposeA: true,
      b: query(act.q),
      c: key(grad.k),
      scale,
      ...attention.keys,
    }),
    await packHeads(
      "pack_back",
      [angles, grad.qkv, grad.q, grad.k, grad.v],
      [1, 2, 3, 4, 5],
      rows * qkvColumns / 2,
    ),
    ...await linearBack("qkv", act.normed, grad.qkv, grad.normed),
    ...await normBack(act.x, "input", act.inverse),
  ];
  return {
    ...block,
    dout: grad.out,
    dx: grad.x,
    normGradients,
    gradients: {
      "self_attn.q_proj": grad.weights.qkv,
      "self_attn.k_proj": grad.weights.qkv,
      "self_attn.v_proj": grad.weights.qkv,
      "self_attn.o_proj": grad.weights.o,
      "mlp.gate_proj": grad.weights.gateUp,
      "mlp.up_proj": grad.weights.gateUp,
      "mlp.down_proj": grad.weights.down,
    },
    backward,
  };
}
