/**
 * Which tensors a model is made of, and of which shapes: float matrices as `NAME.weight (N, K)`,
 * CodeGEMM matrices in the published layout (arXiv 2512.17970, naver-aics/codegemm):
 *
 * | tensor | dtype | shape | what |
 * | --- | --- | --- | --- |
 * | `NAME.codes` | I32 | `(m, K/v/4, N)` | four consecutive codes along K in a word, lowest byte first |
 * | `NAME.codebooks` | F16 | `(m, 2^b, v)` | centroids, one set per matrix |
 * | `NAME.scales` | F16 | `(K/g, N)` | one scale per g consecutive weights of a row |
 *
 * @module
 */
import { FleetError } from "../errors.ts";
import {
  type CodeGemmFormat,
  type DType,
  LINEAR_NAMES,
  linearShape,
  type ModelConfig,
  type PartName,
} from "../model_config.ts";

/** A tensor the model needs. */
export interface WantedTensor {
  name: string;
  shape: number[];
  dtypes: readonly DType[];
}

const FLOAT: readonly DType[] = ["F16", "BF16", "F32"];
const F16: readonly DType[] = ["F16"];
const I32: readonly DType[] = ["I32"];

/** The three tensors of a matrix in CodeGEMM format. */
export const CODEGEMM_TENSORS = ["codes", "codebooks", "scales"] as const;

/** `m1v4g128` and the like. */
export function formatName(format: CodeGemmFormat): string {
  return `m${format.m}v${format.v}g${format.g}${format.b === 8 ? "" : `b${format.b}`}`;
}

/**
 * Says whether a matrix can be stored in a format, and why not.
 *
 * @param matrix its name, for the error
 * @param shape `[N, K]`
 * @throws FleetError `bad-checkpoint`
 */
export function checkFormat(
  format: CodeGemmFormat,
  matrix: string,
  [n, k]: [n: number, k: number],
): void {
  const { v, g, b } = format;
  const why = b !== 8
    ? `codes of ${b} bits are not supported, only of 8`
    : k % (4 * v) !== 0
    ? `K is no multiple of 4 v = ${4 * v}`
    : g % v !== 0
    ? `g = ${g} is no multiple of v = ${v}`
    : k % g !== 0
    ? `K is no multiple of g = ${g}`
    : undefined;
  if (why) {
    throw new FleetError(
      "bad-checkpoint",
      `${matrix} (N ${n}, K ${k}) cannot be in format ${formatName(format)}: ${why}`,
    );
  }
}

/** The tensors of one matrix in a format, with their shapes. */
export function codegemmTensors(
  format: CodeGemmFormat,
  matrix: string,
  [n, k]: [n: number, k: number],
): WantedTensor[] {
  const { m, v, g, b } = format;
  return [
    { name: `${matrix}.codes`, dtypes: I32, shape: [m, k / v / 4, n] },
    { name: `${matrix}.codebooks`, dtypes: F16, shape: [m, 2 ** b, v] },
    { name: `${matrix}.scales`, dtypes: F16, shape: [k / g, n] },
  ];
}

/** All parts of a model, in the order of the forward pass. */
export function allParts(config: ModelConfig): PartName[] {
  return [
    "embedding",
    ...Array.from({ length: config.layers }, (_, i): PartName => `layer.${i}`),
    "head",
  ];
}

/**
 * What a part consists of.
 *
 * @param has which tensors there are; a quantized checkpoint may keep single matrices as `.weight`.
 *   Without it every matrix is taken to be in the config's format.
 * @throws FleetError `bad-checkpoint` when a matrix cannot be in the config's format
 */
export function wantedTensors(
  config: ModelConfig,
  part: PartName,
  has: (name: string) => boolean = () => false,
): WantedTensor[] {
  const { hiddenSize, vocabSize } = config;
  const embedding: WantedTensor = {
    name: "model.embed_tokens.weight",
    dtypes: FLOAT,
    shape: [vocabSize, hiddenSize],
  };
  const norm = (name: string): WantedTensor => ({ name, dtypes: FLOAT, shape: [hiddenSize] });
  switch (part) {
    case "embedding":
      return [embedding];
    case "head":
      return [
        norm("model.norm.weight"),
        config.tiedEmbeddings ? embedding : { ...embedding, name: "lm_head.weight" },
      ];
  }
  const layer = `model.layers.${part.slice("layer.".length)}`;
  const linear = LINEAR_NAMES.flatMap((linearName): WantedTensor[] => {
    const matrix = `${layer}.${linearName}`;
    const shape = linearShape(config, linearName);
    if (!config.codegemm || has(`${matrix}.weight`)) {
      return [{ name: `${matrix}.weight`, dtypes: FLOAT, shape }];
    }
    checkFormat(config.codegemm, matrix, shape);
    return codegemmTensors(config.codegemm, matrix, shape);
  });
  return [
    norm(`${layer}.input_layernorm.weight`),
    norm(`${layer}.post_attention_layernorm.weight`),
    ...linear,
  ];
}

/**
 * The exact tensor names of a part.
 *
 * @param has as for {@linkcode wantedTensors}
 */
export function partTensors(
  config: ModelConfig,
  part: PartName,
  has?: (name: string) => boolean,
): string[] {
  return wantedTensors(config, part, has).map((tensor) => tensor.name);
}
