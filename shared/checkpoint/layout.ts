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
 * Two things go beyond what is published, for what AQLM has (arXiv 2401.06118): codes of 9 to 16 bits
 * stand two to a word, the lower half first, in `(m, K/v/2, N)`; and `group_size` -1 is one scale per
 * row, `(1, N)`.
 *
 * @module
 */
import { FleetError } from "../errors.ts";
import {
  type CodeGemmFormat,
  codesPerWord,
  type DType,
  LINEAR_NAMES,
  linearShape,
  matrixFormat,
  type ModelConfig,
  type PartName,
  ROW_SCALE,
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

/** Beyond these the kernels' code grows too long. */
const MAX_CODEBOOKS = 16;
const MAX_VECTOR = 64;

/** `m1v4g128` and the like; `m1v8b16` has one scale per row and codes of 16 bits. */
export function formatName({ m, v, g, b }: CodeGemmFormat): string {
  return `m${m}v${v}${g === ROW_SCALE ? "" : `g${g}`}${b === 8 ? "" : `b${b}`}`;
}

/**
 * The format of a name: `mXvYgZbW`, where no `g` is one scale per row and no `b` is 8 bits a code.
 *
 * @returns null when it is no such name
 *
 * @example
 * ```ts
 * import { formatName, parseFormatName } from "./layout.ts";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(parseFormatName("m1v4g128"), { m: 1, v: 4, g: 128, b: 8 });
 * assertEquals(parseFormatName("m1v8b16"), { m: 1, v: 8, g: -1, b: 16 });
 * assertEquals(parseFormatName("int4"), null);
 * ```
 */
export function parseFormatName(name: string): CodeGemmFormat | null {
  const match = /^m([1-9]\d{0,3})v([1-9]\d{0,5})(?:g([1-9]\d{0,5}))?(?:b([1-9]\d?))?$/.exec(name);
  if (!match) return null;
  const [, m, v, g = ROW_SCALE, b = 8] = match;
  return { m: Number(m), v: Number(v), g: Number(g), b: Number(b) };
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
  [n, k]: readonly [n: number, k: number],
): void {
  const { m, v, g, b } = matrixFormat(format, k);
  const perWord = codesPerWord(format);
  const odd = Object.entries({ m, v, g, b, N: n, K: k })
    .find(([, value]) => !Number.isSafeInteger(value) || value < 1);
  const why = odd
    ? `${odd[0]} must be a positive integer`
    : b < 8 || b > 16
    ? `codes of ${b} bits are not supported, only of 8 to 16`
    : m > MAX_CODEBOOKS
    ? `more than ${MAX_CODEBOOKS} codebooks are not supported`
    : v > MAX_VECTOR
    ? `vectors of more than ${MAX_VECTOR} weights are not supported`
    : k % (perWord * v) !== 0
    ? `K is no multiple of ${perWord} v = ${perWord * v}`
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
  [n, k]: readonly [n: number, k: number],
): WantedTensor[] {
  const { m, v, g, b } = matrixFormat(format, k);
  return [
    { name: `${matrix}.codes`, dtypes: I32, shape: [m, k / v / codesPerWord(format), n] },
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
