/**
 * A Llama-family model as the code works with it: `config.json` parsed once, and the names of the
 * tensors that make up each part of it.
 *
 * @module
 */

/** The codebook format of a quantized checkpoint; see {@linkcode bitsPerWeight} for what it costs. */
export interface CodeGemmFormat {
  /** Codebooks whose centroids are summed. */
  m: number;
  /** Weights per code. */
  v: number;
  /** Consecutive weights of a row that share a scale, or {@linkcode ROW_SCALE}. */
  g: number;
  /** Bits of a code, 8 to 16; a codebook has `2^b` centroids. */
  b: number;
}

/** In place of {@linkcode CodeGemmFormat.g}: one scale for a whole row, however long. */
export const ROW_SCALE = -1;

/** The format as it is in a matrix of this K: a scale for a whole row is one for K weights. */
export function matrixFormat(format: CodeGemmFormat, k: number): CodeGemmFormat {
  return format.g === ROW_SCALE ? { ...format, g: k } : format;
}

/** Codes of a 32-bit word: four of 8 bits, or two of 9 to 16 bits. */
export function codesPerWord({ b }: Pick<CodeGemmFormat, "b">): 4 | 2 {
  return b > 8 ? 2 : 4;
}

/** `m b / v + 16 / g`; one scale for a whole row is too little to count. */
export function bitsPerWeight(format: CodeGemmFormat): number {
  const scaleBits = format.g === ROW_SCALE ? 0 : 16 / format.g;
  return format.m * format.b / format.v + scaleBits;
}

/** The frequency scaling of Llama 3.1 and later (`rope_type: "llama3"`). */
export interface Llama3RopeScaling {
  factor: number;
  lowFreqFactor: number;
  highFreqFactor: number;
  originalContextTokens: number;
}

/** What `config.json` says, checked and in one spelling. */
export interface ModelConfig {
  hiddenSize: number;
  layers: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  ffnSize: number;
  vocabSize: number;
  /** `max_position_embeddings`. */
  contextTokens: number;
  rmsNormEps: number;
  ropeTheta: number;
  ropeScaling: Llama3RopeScaling | null;
  /** The output head is the embedding matrix. */
  tiedEmbeddings: boolean;
  bosToken: number | null;
  /** Any of these ends a sequence. */
  eosTokens: number[];
  /** Null for a float checkpoint. */
  codegemm: CodeGemmFormat | null;
}

/** The seven linear layers of a transformer layer, with their shapes `N x K`. */
export const LINEAR_NAMES = [
  "self_attn.q_proj",
  "self_attn.k_proj",
  "self_attn.v_proj",
  "self_attn.o_proj",
  "mlp.gate_proj",
  "mlp.up_proj",
  "mlp.down_proj",
] as const;

/** Name of a linear layer within its transformer layer. */
export type LinearName = typeof LINEAR_NAMES[number];

/** `[N, K]` (outputs, inputs) of a linear layer. */
export function linearShape(config: ModelConfig, name: LinearName): [n: number, k: number] {
  const { hiddenSize: h, heads, kvHeads, headDim, ffnSize } = config;
  switch (name) {
    case "self_attn.q_proj":
      return [heads * headDim, h];
    case "self_attn.k_proj":
    case "self_attn.v_proj":
      return [kvHeads * headDim, h];
    case "self_attn.o_proj":
      return [h, heads * headDim];
    case "mlp.gate_proj":
    case "mlp.up_proj":
      return [ffnSize, h];
    case "mlp.down_proj":
      return [h, ffnSize];
  }
}

/** A piece of the model that is moved and held as a whole. */
export type PartName = "embedding" | "head" | `layer.${number}`;

/** The parts of a stage that holds layers `[from, to)`. */
export function stageParts(
  stage: { from: number; to: number; first: boolean; last: boolean },
): PartName[] {
  const parts: PartName[] = [];
  if (stage.first) parts.push("embedding");
  for (let i = stage.from; i < stage.to; i++) parts.push(`layer.${i}`);
  if (stage.last) parts.push("head");
  return parts;
}

/** Element types we read from checkpoints, by their safetensors names. */
export type DType = "F16" | "BF16" | "F32" | "I32" | "I16" | "I8" | "U8";

/** Bytes of one element. */
export const DTYPE_BYTES: Record<DType, number> = {
  F16: 2,
  BF16: 2,
  F32: 4,
  I32: 4,
  I16: 2,
  I8: 1,
  U8: 1,
};

/** A tensor as it is stored. */
export interface TensorInfo {
  name: string;
  dtype: DType;
  shape: number[];
  bytes: number;
}

/**
 * Tensors by name, wherever they come from (a checkpoint directory, parts from the object store, a
 * worker's cache, random numbers). Large tensors are read in slices.
 */
export interface TensorSource {
  names(): string[];
  /** @throws FleetError `bad-checkpoint` when there is no such tensor */
  info(name: string): TensorInfo;
  has(name: string): boolean;
  /**
   * Bytes `[offset, offset + length)` of a tensor, in a buffer of the caller's own.
   *
   * @throws FleetError `bad-checkpoint` when the file is shorter than it says
   */
  read(name: string, offset: number, length: number): Promise<Uint8Array<ArrayBuffer>>;
}
