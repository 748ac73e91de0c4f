/**
 * The forward pass of a stage: a Llama transformer (Touvron et al. 2023, Grattafiori et al. 2024), or
 * the run of its layers that the stage holds.
 *
 * @module
 */
import type { Kernel } from "../kernels/kernel.ts";
import type { Linear } from "../kernels/linear/mod.ts";
import type { Sampler } from "../kernels/sampling/mod.ts";
import type { TransformerShape } from "../kernels/transformer/mod.ts";

/** The kernels of one transformer layer, bound to its weights and pages. */
export interface LayerKernels {
  inputNorm: Kernel;
  /** One stack of three matrices, or three that write into one buffer, side by side. */
  queriesKeysValues: Linear[];
  /** Of the rows whose q, k and v are stored: a stack finishes its decode rows itself. */
  rope: Kernel;
  decodeAttention: Kernel;
  prefillAttention: { encode(pass: GPUComputePassEncoder, step: TransformerShape): void };
  attentionOut: Linear;
  postNorm: Kernel;
  /** One stack of two matrices, or two that write into one buffer, side by side. */
  gateUp: Linear[];
  /** Of the rows whose gate and up are stored. */
  swiglu: Kernel;
  down: Linear;
}

/** The kernels behind the last layer. */
export interface HeadKernels {
  norm: Kernel;
  projection: Linear;
  sampler: Sampler;
}

/** All kernels of a stage. */
export interface StageKernels {
  /** Embedding on the first stage, import of the previous stage's rows on the others. */
  enter: Kernel;
  layers: LayerKernels[];
  /** The head on the last stage, export of the rows on the others. */
  leave: HeadKernels | Kernel;
}

/** Encodes what comes before a stage's first layer. */
export function forwardEntry(
  pass: GPUComputePassEncoder,
  step: TransformerShape,
  stage: StageKernels,
): void {
  stage.enter.encode(pass, step); // residual = embedding[token], or the previous stage's rows
}

/**
 * Encodes consecutive layers. Only the counts of the step decide what is encoded.
 *
 * Between layers the residual is float16 in float32's clothes: the last linear layer of each rounds
 * it, so that the bits are the same whether or not a stage ends there. Linear layers and attention
 * have a kernel family for decode rows and one for prefill rows; the rest takes all rows alike.
 */
export function forwardLayers(
  pass: GPUComputePassEncoder,
  step: TransformerShape,
  layers: readonly LayerKernels[],
): void {
  const linear = (layer: Linear) => {
    layer.encode(pass, step, "decode");
    layer.encode(pass, step, "prefill");
  };

  for (const layer of layers) {
    layer.inputNorm.encode(pass, step); // x = norm(residual)
    layer.queriesKeysValues.forEach(linear); // q, k, v = Wq x, Wk x, Wv x
    layer.rope.encode(pass, step); // q, k turned; k, v into the pages
    layer.decodeAttention.encode(pass, step); // a = softmax(q k / sqrt(d)) v
    layer.prefillAttention.encode(pass, step);
    linear(layer.attentionOut); // residual += Wo a

    layer.postNorm.encode(pass, step); // x = norm(residual)
    layer.gateUp.forEach(linear); // g, u = Wgate x, Wup x
    layer.swiglu.encode(pass, step); // h = silu(g) u
    linear(layer.down); // residual = f16(residual + Wdown h)
  }
}

/** Encodes the rest of a step: its outputs. */
export function forwardOutputs(
  pass: GPUComputePassEncoder,
  step: TransformerShape,
  stage: StageKernels,
): void {
  if ("sampler" in stage.leave) {
    const { norm, projection, sampler } = stage.leave;
    norm.encode(pass, step); // x = norm(residual) of the rows that have a request
    projection.encode(pass, step, "outputs"); // logits = Whead x
    sampler.encode(pass, step);
  } else {
    stage.leave.encode(pass, step);
  }
}
