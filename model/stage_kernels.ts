/**
 * The kernels of a stage, each bound to its weights, pages and activations.
 *
 * @module
 */
import type { PartName } from "../shared/model_config.ts";
import type { Gpu } from "../kernels/gpu.ts";
import type { Kernel, LinearStore, RowsView } from "../kernels/kernel.ts";
import {
  createInt8Rows,
  createLinear,
  type Int8Rows,
  type Linear,
  linearScratchBytes,
  type Matrix,
  type PairFinish,
} from "../kernels/linear/mod.ts";
import { createSampler } from "../kernels/sampling/mod.ts";
import {
  createDecodeAttention,
  createEmbedding,
  createFinalNorm,
  createHiddenExport,
  createHiddenImport,
  createPrefillAttention,
  createRmsNorm,
  createRope,
  createSwiGlu,
  type HeadShape,
  ropeFinish,
  type StepInputs,
  swigluFinish,
} from "../kernels/transformer/mod.ts";
import type { HeadKernels, LayerKernels, StageKernels } from "./forward.ts";
import type { LayerPages } from "./kv_cache.ts";
import type { StageMemory } from "./stage_buffers.ts";
import type { StageProgress, StageSpec } from "./stage_spec.ts";
import type { LayerWeights, WeightStore } from "./weights.ts";

/** What the kernels of a stage are made from. */
export interface StageParts {
  gpu: Gpu;
  spec: StageSpec;
  shape: HeadShape;
  weights: WeightStore;
  inputs: StepInputs;
  memory: StageMemory;
  pages: readonly LayerPages[];
}

/** Bound kernels, and the scratch that the linear layers share. */
export interface BoundStage {
  kernels: StageKernels;
  scratchBytes: number;
  destroy(): void;
}

/**
 * Compiles and binds all kernels of a stage; its parts must be in the store.
 *
 * @throws FleetError `gpu` when a kernel does not compile, `out-of-memory` for the scratch
 */
export async function bindStage(
  parts: StageParts,
  onProgress?: (progress: StageProgress) => void,
): Promise<BoundStage> {
  const { gpu, spec, weights } = parts;
  const keyOf = (part: PartName) => spec.parts?.get(part) ?? part;
  const layerWeights: LayerWeights[] = [];
  for (let i = spec.from; i < spec.to; i++) {
    layerWeights.push(weights.get(`layer.${i}`, keyOf(`layer.${i}`)));
  }
  const head = spec.last ? weights.get("head", keyOf("head")) : null;
  const linears = new LinearBinder(parts);
  await linears.allocateScratch(
    layerWeights.flatMap((layer) => [
      ...layer.queriesKeysValues,
      layer.attentionOut,
      ...layer.gateUp,
      layer.down,
    ]),
    head?.projection ?? null,
  );
  const layers: LayerKernels[] = [];
  for (const [index, layer] of layerWeights.entries()) {
    onProgress?.({
      what: `kernels of layer ${spec.from + index}`,
      done: index,
      total: layerWeights.length,
    });
    layers.push(await bindLayer(parts, linears, layer, parts.pages[index]));
  }
  const enter = await bindEntry(parts, keyOf("embedding"));
  const leave = head ? await bindHead(parts, linears, head) : await bindExit(parts);
  onProgress?.({ what: "kernels", done: layerWeights.length, total: layerWeights.length });
  gpu.check();
  return {
    kernels: { enter, layers, leave },
    scratchBytes: linears.scratchBytes,
    destroy() {
      linears.destroy();
      if ("sampler" in leave) leave.sampler.destroy();
    },
  };
}

async function bindEntry(parts: StageParts, embeddingKey: string): Promise<Kernel> {
  const { gpu, spec, weights, inputs } = parts;
  const { residual, frame } = parts.memory.buffers;
  const hidden = spec.config.hiddenSize;
  if (!spec.first) return await createHiddenImport({ gpu, inputs, hidden, frame, residual });
  const { pieces } = weights.get("embedding", embeddingKey);
  return await createEmbedding({ gpu, inputs, pieces, hidden, residual });
}

async function bindExit({ gpu, spec, inputs, memory }: StageParts): Promise<Kernel> {
  const { residual, frame } = memory.buffers;
  return await createHiddenExport({
    gpu,
    inputs,
    hidden: spec.config.hiddenSize,
    residual,
    frame,
  });
}

async function bindHead(
  { gpu, spec, inputs, memory }: StageParts,
  linears: LinearBinder,
  weights: { norm: GPUBuffer; projection: Matrix },
): Promise<HeadKernels> {
  const { hiddenSize: hidden, vocabSize: vocab, rmsNormEps: epsilon } = spec.config;
  const { residual, head } = memory.buffers;
  const { normed, logits } = head!;
  const logitRows: RowsView = { buffer: logits, stride: vocab, offset: 0 };
  return {
    norm: await createFinalNorm({
      gpu,
      inputs,
      hidden,
      epsilon,
      residual,
      weight: weights.norm,
      normed,
    }),
    projection: await linears.bindProjection(weights.projection, rowsOf(normed, hidden), logitRows),
    sampler: await createSampler({
      gpu,
      logits: logitRows,
      vocab,
      maxOutputs: spec.limits.maxOutputs,
    }),
  };
}

async function bindLayer(
  { gpu, spec, shape, inputs, memory }: StageParts,
  linears: LinearBinder,
  weights: LayerWeights,
  pages: LayerPages,
): Promise<LayerKernels> {
  const { hiddenSize: hidden, ffnSize: width, rmsNormEps: epsilon } = spec.config;
  const { residual, normed, qkv, attended, gateUp, gated, angles } = memory.buffers;
  const queryColumns = shape.heads * shape.headDim;
  const qkvColumns = queryColumns + 2 * shape.kvHeads * shape.headDim;
  const normedRows = rowsOf(normed, hidden);
  const residualRows = rowsOf(residual, hidden);
  const norm = (weight: GPUBuffer) =>
    createRmsNorm({ gpu, hidden, epsilon, residual, weight, normed });
  const attention = { gpu, inputs, shape, qkv, ...pages, attended };
  const queriesKeysValues = await linears.bindSideBySide(
    weights.queriesKeysValues,
    normedRows,
    { buffer: qkv, stride: qkvColumns, offset: 0 },
    ropeFinish(shape, inputs, { angles, ...pages }),
  );
  const gateUpLinears = await linears.bindSideBySide(
    weights.gateUp,
    normedRows,
    { buffer: gateUp, stride: 2 * width, offset: 0 },
    swigluFinish(width, gated),
  );
  const storedRows = (linears: Linear[]) => linears[0].finishes ? "prefill" : "all";
  return {
    inputNorm: await norm(weights.inputNorm),
    queriesKeysValues,
    rope: await createRope({
      gpu,
      inputs,
      shape,
      angles,
      qkv,
      ...pages,
      rows: storedRows(queriesKeysValues),
    }),
    decodeAttention: await createDecodeAttention({
      ...attention,
      scratch: memory.attentionScratch,
    }),
    prefillAttention: await createPrefillAttention(attention),
    attentionOut: await linears.bind(
      weights.attentionOut,
      rowsOf(attended, queryColumns),
      residualRows,
      "add",
    ),
    postNorm: await norm(weights.postNorm),
    gateUp: gateUpLinears,
    swiglu: await createSwiGlu({
      gpu,
      inputs,
      width,
      gateUp,
      gated,
      rows: storedRows(gateUpLinears),
    }),
    down: await linears.bind(weights.down, rowsOf(gated, width), residualRows, "add-round"),
  };
}

const rowsOf = (buffer: GPUBuffer, stride: number): RowsView => ({ buffer, stride, offset: 0 });

/** Binds linear layers that share one scratch buffer: the dispatches of a pass run in order. */
class LinearBinder {
  readonly #parts: StageParts;
  readonly #bound: Linear[] = [];
  #scratch: GPUBuffer | null = null;
  #int8Rows: Int8Rows | undefined;

  constructor(parts: StageParts) {
    this.#parts = parts;
  }

  get scratchBytes(): number {
    const { values, largest } = this.#int8Rows ?? {};
    return [this.#scratch, values, largest].reduce((sum, buffer) => sum + (buffer?.size ?? 0), 0);
  }

  async allocateScratch(layers: readonly Matrix[], projection: Matrix | null): Promise<void> {
    const { gpu, spec: { limits } } = this.#parts;
    const scratchBytes = ({ n, k, format, order }: Matrix, maxRows: number) =>
      linearScratchBytes([n, k], format, maxRows, order);
    const bytes = Math.max(
      ...layers.map((matrix) => scratchBytes(matrix, limits.maxRows)),
      projection ? scratchBytes(projection, limits.maxOutputs) : 0,
    );
    this.#scratch = await gpu.allocate(
      "partial sums of the linear layers",
      () => gpu.storage("linear scratch", bytes),
    );
    if (this.#parts.spec.profile.decode !== "int8") return;
    const k = Math.max(...layers.map((matrix) => matrix.k));
    this.#int8Rows = await gpu.allocate(
      "activations as integers",
      () => createInt8Rows(gpu, k, limits.maxRows),
    );
  }

  /** A linear layer over the step's decode and prefill rows. */
  bind(matrix: Matrix, input: RowsView, output: RowsView, store: LinearStore): Promise<Linear> {
    const { maxRows } = this.#parts.spec.limits;
    return this.#create(matrix, input, output, store, maxRows, ["decode", "prefill"]);
  }

  /**
   * Linear layers that store their columns side by side; a stack of all columns may finish its decode
   * rows instead.
   */
  async bindSideBySide(
    matrices: readonly Matrix[],
    input: RowsView,
    output: RowsView,
    finish: PairFinish,
  ): Promise<Linear[]> {
    const { maxRows } = this.#parts.spec.limits;
    const whole = matrices.length === 1 ? finish : undefined;
    const bound: Linear[] = [];
    let { offset } = output;
    for (const matrix of matrices) {
      const columns = { ...output, offset };
      bound.push(
        await this.#create(
          matrix,
          input,
          columns,
          "store",
          maxRows,
          ["decode", "prefill"],
          whole,
        ),
      );
      offset += matrix.n;
    }
    return bound;
  }

  /** The projection to the vocabulary, over the step's outputs. */
  bindProjection(matrix: Matrix, input: RowsView, output: RowsView): Promise<Linear> {
    const { maxOutputs } = this.#parts.spec.limits;
    return this.#create(matrix, input, output, "store", maxOutputs, ["outputs"]);
  }

  async #create(
    matrix: Matrix,
    input: RowsView,
    output: RowsView,
    store: LinearStore,
    maxRows: number,
    ranges: readonly ("decode" | "prefill" | "outputs")[],
    finish?: PairFinish,
  ): Promise<Linear> {
    const { gpu, spec, inputs } = this.#parts;
    const linear = await createLinear({
      gpu,
      label: matrix.name,
      matrix,
      step: inputs.step,
      input,
      output,
      store,
      maxRows,
      scratch: this.#scratch!,
      int8Rows: this.#int8Rows,
      finish,
      ranges,
      profile: spec.profile,
      variant: spec.variants?.(matrix),
    });
    this.#bound.push(linear);
    return linear;
  }

  destroy(): void {
    this.#bound.splice(0).forEach((linear) => linear.destroy());
    this.#scratch?.destroy();
    this.#int8Rows?.values.destroy();
    this.#int8Rows?.largest.destroy();
  }
}
