/**
 * Weights on the GPU, part by part. A part outlives the stages that use it, so that a new plan loads
 * only what is new to this GPU.
 *
 * @module
 */
import { toFloat16, toFloat32 } from "../shared/checkpoint/mod.ts";
import { FleetError, invariant } from "../shared/errors.ts";
import {
  type CodeGemmFormat,
  DTYPE_BYTES,
  type LinearName,
  linearShape,
  type ModelConfig,
  type PartName,
  stageParts,
  type TensorSource,
} from "../shared/model_config.ts";
import type { Gpu } from "../kernels/gpu.ts";
import {
  isStackable,
  loadMatrix,
  loadStack,
  type Matrix,
  type MatrixShape,
  type StackMember,
} from "../kernels/linear/mod.ts";
import type { EmbeddingPiece } from "../kernels/transformer/mod.ts";
import type { StageSpec } from "./stage_spec.ts";

/** Weights of a transformer layer. Norms are float32. */
export interface LayerWeights {
  inputNorm: GPUBuffer;
  postNorm: GPUBuffer;
  /** q, k and v: one stack of the three, or each its own. */
  queriesKeysValues: Matrix[];
  attentionOut: Matrix;
  /** Gate and up: one stack of the two, or each its own. */
  gateUp: Matrix[];
  down: Matrix;
}

/** The embedding table, cut where the GPU cannot bind it as a whole. */
export interface EmbeddingWeights {
  pieces: EmbeddingPiece[];
}

/** The final norm (float32) and the projection to the vocabulary. */
export interface HeadWeights {
  norm: GPUBuffer;
  projection: Matrix;
}

/** What a part's name says it holds. */
export type PartWeights<P extends PartName> = P extends "embedding" ? EmbeddingWeights
  : P extends "head" ? HeadWeights
  : LayerWeights;

/** Where the matrices of a part come from: a checkpoint, or a benchmark's random weights. */
export interface MatrixSource {
  matrix(name: string, shape: MatrixShape, format: CodeGemmFormat | null): Promise<Matrix>;
  /** Whether {@linkcode stack} can make one matrix of these. */
  canStack(members: readonly StackMember[], format: CodeGemmFormat): boolean;
  /** Up to three matrices of one input as one. */
  stack(members: readonly StackMember[], k: number, format: CodeGemmFormat): Promise<Matrix>;
}

/** The matrices of a checkpoint. */
function matricesOf(gpu: Gpu, tensors: TensorSource): MatrixSource {
  return {
    matrix: (name, shape, format) => loadMatrix(gpu, tensors, name, shape, format),
    canStack: (members, format) => isStackable(tensors, members, format),
    stack: (members, k, format) =>
      loadStack(gpu, tensors, members.map(({ name }) => name).join(" | "), members, k, format),
  };
}

interface HeldPart {
  part: PartName;
  weights: EmbeddingWeights | HeadWeights | LayerWeights;
  bytes: number;
  destroy(): void;
}

/** Bytes of an embedding table that are read and uploaded at a time. */
const SLICE_BYTES = 16 * 2 ** 20;
/** Slices after which we wait for the GPU, so that its staging memory stays small. */
const SLICES_PER_FLUSH = 4;

/** The parts that a GPU holds, by key: the digest of a part, or its name where there is one model. */
export class WeightStore {
  readonly #gpu: Gpu;
  readonly #parts = new Map<string, HeldPart>();

  constructor(gpu: Gpu) {
    this.#gpu = gpu;
  }

  /** Bytes of GPU memory of all parts. */
  get bytes(): number {
    let sum = 0;
    for (const part of this.#parts.values()) sum += part.bytes;
    return sum;
  }

  /** Keys of all parts. */
  keys(): string[] {
    return [...this.#parts.keys()];
  }

  has(key: string): boolean {
    return this.#parts.has(key);
  }

  /** Bytes of GPU memory of the parts that a stage uses. */
  bytesOfStage(stage: StageSpec): number {
    return stageParts(stage).reduce(
      (sum, part) => sum + this.#held(stage.parts?.get(part) ?? part).bytes,
      0,
    );
  }

  /**
   * Brings a part onto the GPU, unless it is there. One call at a time: error scopes nest.
   *
   * @param matrices where matrices come from, if not from the tensors
   * @throws FleetError `bad-checkpoint`, `out-of-memory`; what was loaded of the part is freed then
   */
  async load(
    config: ModelConfig,
    part: PartName,
    tensors: TensorSource,
    key: string = part,
    matrices: MatrixSource = matricesOf(this.#gpu, tensors),
  ): Promise<void> {
    if (this.#parts.has(key)) return;
    const loader = new PartLoader(this.#gpu, config, tensors, matrices);
    try {
      const weights = await loader.load(part);
      this.#gpu.check();
      const { bytes } = loader;
      this.#parts.set(key, { part, weights, bytes, destroy: () => loader.destroy() });
    } catch (error) {
      loader.destroy();
      throw error;
    }
  }

  /** A part's weights; it must have been loaded. */
  get<P extends PartName>(part: P, key: string = part): PartWeights<P> {
    const held = this.#held(key);
    invariant(held.part === part, `the part under ${key} is ${held.part}, not ${part}`);
    return held.weights as PartWeights<P>;
  }

  /** Frees every part that is not named. No stage may still use it. */
  keepOnly(keys: ReadonlySet<string>): void {
    for (const [key, held] of this.#parts) {
      if (keys.has(key)) continue;
      held.destroy();
      this.#parts.delete(key);
    }
  }

  /** Frees everything. */
  destroy(): void {
    this.keepOnly(new Set());
  }

  #held(key: string): HeldPart {
    const held = this.#parts.get(key);
    invariant(held, `part ${key} is loaded before it is used`);
    return held;
  }
}

async function inTurn<T, U>(items: readonly T[], make: (item: T) => Promise<U>): Promise<U[]> {
  const made: U[] = [];
  for (const item of items) made.push(await make(item));
  return made;
}

/** Loads one part, and knows how to take it back. */
class PartLoader {
  readonly #gpu: Gpu;
  readonly #config: ModelConfig;
  readonly #tensors: TensorSource;
  readonly #matrices: MatrixSource;
  readonly #made: { destroy(): void }[] = [];
  bytes = 0;

  constructor(gpu: Gpu, config: ModelConfig, tensors: TensorSource, matrices: MatrixSource) {
    this.#gpu = gpu;
    this.#config = config;
    this.#tensors = tensors;
    this.#matrices = matrices;
  }

  load(part: PartName): Promise<EmbeddingWeights | HeadWeights | LayerWeights> {
    switch (part) {
      case "embedding":
        return this.#embedding();
      case "head":
        return this.#head();
      default:
        return this.#layer(`model.${part.replace("layer.", "layers.")}`);
    }
  }

  destroy(): void {
    for (const made of this.#made.splice(0)) made.destroy();
  }

  async #layer(prefix: string): Promise<LayerWeights> {
    const matrix = async (name: LinearName) =>
      await this.#matrix(
        `${prefix}.${name}`,
        linearShape(this.#config, name),
        this.#config.codegemm,
      );
    const stack = async (names: LinearName[]) => {
      const members = names.map((name) => ({
        name: `${prefix}.${name}`,
        n: linearShape(this.#config, name)[0],
      }));
      const format = this.#config.codegemm;
      if (format === null || !this.#matrices.canStack(members, format)) {
        return await inTurn(names, matrix);
      }
      const [, k] = linearShape(this.#config, names[0]);
      return [this.#keep(await this.#matrices.stack(members, k, format))];
    };
    return {
      inputNorm: await this.#norm(`${prefix}.input_layernorm.weight`),
      postNorm: await this.#norm(`${prefix}.post_attention_layernorm.weight`),
      queriesKeysValues: await stack([
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
      ]),
      attentionOut: await matrix("self_attn.o_proj"),
      gateUp: await stack(["mlp.gate_proj", "mlp.up_proj"]),
      down: await matrix("mlp.down_proj"),
    };
  }

  async #head(): Promise<HeadWeights> {
    const { tiedEmbeddings, vocabSize, hiddenSize } = this.#config;
    const name = tiedEmbeddings ? "model.embed_tokens" : "lm_head";
    return {
      norm: await this.#norm("model.norm.weight"),
      projection: await this.#matrix(name, [vocabSize, hiddenSize], null),
    };
  }

  async #matrix(
    name: string,
    shape: [n: number, k: number],
    format: CodeGemmFormat | null,
  ): Promise<Matrix> {
    return this.#keep(await this.#matrices.matrix(name, shape, format));
  }

  #keep(matrix: Matrix): Matrix {
    this.bytes += matrix.bytes;
    this.#made.push(matrix);
    return matrix;
  }

  async #norm(name: string): Promise<GPUBuffer> {
    const { dtype, bytes } = this.#expect(name, [this.#config.hiddenSize]);
    const values = toFloat32(name, dtype, await this.#tensors.read(name, 0, bytes));
    const buffer = await this.#buffer(name, values.byteLength);
    this.#gpu.write(buffer, 0, values);
    return buffer;
  }

  async #embedding(): Promise<EmbeddingWeights> {
    const { vocabSize, hiddenSize } = this.#config;
    const name = "model.embed_tokens.weight";
    const { dtype } = this.#expect(name, [vocabSize, hiddenSize]);
    const { maxStorageBufferBindingSize, maxBufferSize } = this.#gpu.limits;
    const most = Math.floor(
      Math.min(maxStorageBufferBindingSize, maxBufferSize) / (2 * hiddenSize),
    );
    // An even number of rows at a time is a whole number of words, whatever their length.
    const perPiece = Math.max(2, most & ~1);
    const perSlice = Math.max(2, Math.floor(SLICE_BYTES / (2 * hiddenSize)) & ~1);
    const rowBytes = hiddenSize * DTYPE_BYTES[dtype];
    const pieces: EmbeddingPiece[] = [];
    let slices = 0;
    for (let first = 0; first < vocabSize; first += perPiece) {
      const tokens = Math.min(perPiece, vocabSize - first);
      const buffer = await this.#buffer(name, tokens * hiddenSize * 2);
      for (let at = 0; at < tokens; at += perSlice) {
        const rows = Math.min(perSlice, tokens - at);
        const stored = await this.#tensors.read(name, (first + at) * rowBytes, rows * rowBytes);
        const slice = toFloat16(name, dtype, stored, (first + at) * hiddenSize);
        this.#gpu.write(buffer, at * hiddenSize * 2, slice);
        if (++slices % SLICES_PER_FLUSH === 0) await this.#flush();
      }
      pieces.push({ buffer, firstToken: first, tokens });
    }
    return { pieces };
  }

  async #flush(): Promise<void> {
    this.#gpu.device.queue.submit([]);
    await this.#gpu.device.queue.onSubmittedWorkDone();
    this.#gpu.check();
  }

  async #buffer(name: string, bytes: number): Promise<GPUBuffer> {
    const buffer = await this.#gpu.allocate(name, () => this.#gpu.storage(name, bytes));
    this.bytes += buffer.size;
    this.#made.push(buffer);
    return buffer;
  }

  #expect(name: string, shape: number[]) {
    const info = this.#tensors.info(name);
    if (info.shape.join() !== shape.join()) {
      throw new FleetError(
        "bad-checkpoint",
        `${name} has shape (${info.shape.join(", ")}); the config says (${shape.join(", ")})`,
      );
    }
    return info;
  }
}
