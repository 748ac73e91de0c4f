/**
 * AQLM checkpoints made up for tests, byte for byte as that library writes them, with the weights that
 * their codes stand for.
 *
 * @module
 */
import { checkpointFiles, randomTensors, tensorBytes } from "../shared/checkpoint/fixture.ts";
import type { TensorBytes } from "../shared/checkpoint/mod.ts";
import { LINEAR_NAMES } from "../shared/model_config.ts";
import { randomInt, seededRandom } from "../shared/random.ts";

/** An AQLM format: m codebooks of 2^b vectors of v weights. */
export interface AqlmFormat {
  m: number;
  v: number;
  b: number;
}

/** What differs from a checkpoint as it should be. */
export interface AqlmOptions {
  /** Integers are stored unsigned, as some tools do. */
  unsigned?: boolean;
  /** Keys of `quantization_config` in place of the right ones. */
  section?: Record<string, unknown>;
  /** The tensors before they are written. */
  change?(tensors: TensorBytes[]): TensorBytes[];
}

/** A checkpoint in memory. */
export interface AqlmFixture {
  files: Record<string, Uint8Array | string>;
  /** By the matrix's name, row-major `(N, K)`: float16 products that float64 holds exactly. */
  weights: Map<string, Float64Array>;
  /** All but the matrices. */
  others: TensorBytes[];
}

/**
 * A checkpoint of a model of this `config.json`, every linear layer of its transformer layers in codes.
 *
 * Codes are packed as the AQLM library does: those of half the codebook and more less `2^b`, into the
 * next signed integer.
 */
export function aqlmFixture(
  config: Record<string, unknown>,
  { m, v, b }: AqlmFormat,
  { unsigned = false, section = {}, change = (tensors) => tensors }: AqlmOptions = {},
): AqlmFixture {
  const random = seededRandom(2), weights = new Map<string, Float64Array>();
  const others: TensorBytes[] = [];
  const tensors = randomTensors(config).flatMap((tensor) => {
    if (!LINEAR_NAMES.some((name) => tensor.name.endsWith(`.${name}.weight`))) {
      others.push(tensor);
      return [tensor];
    }
    const matrix = tensor.name.replace(/\.weight$/, ""), [n, k] = tensor.shape;
    const codes = Array.from({ length: n * k / v * m }, () => randomInt(random, 2 ** b));
    const stored = codes.map((code) => code >= 2 ** (b - 1) ? code - 2 ** b : code);
    const halves = (count: number, unit: number) =>
      Float16Array.from({ length: count }, () => (randomInt(random, 64) / 16 - 2) * unit);
    const books = halves(m * 2 ** b * v, 1), scales = halves(n, 1 / 8);
    weights.set(
      matrix,
      Float64Array.from({ length: n * k }, (_, at) => {
        const vector = Math.floor(at / v);
        let sum = 0;
        for (let j = 0; j < m; j++) {
          sum += books[(j * 2 ** b + codes[vector * m + j]) * v + at % v];
        }
        return sum * scales[Math.floor(at / k)];
      }),
    );
    const [dtype, packed] = b > 8
      ? ["I16", Int16Array.from(stored)] as const
      : ["I8", Int8Array.from(stored)] as const;
    return [
      tensorBytes(`${matrix}.codes`, dtype, [n, k / v, m], new Uint8Array(packed.buffer)),
      tensorBytes(`${matrix}.codebooks`, "F16", [m, 2 ** b, 1, v], new Uint8Array(books.buffer)),
      tensorBytes(`${matrix}.scales`, "F16", [n, 1, 1, 1], new Uint8Array(scales.buffer)),
    ];
  });
  const quantization_config = {
    quant_method: "aqlm",
    in_group_size: v,
    out_group_size: 1,
    num_codebooks: m,
    nbits_per_codebook: b,
    linear_weights_not_to_quantize: ["lm_head.weight"],
    ...section,
  };
  const files = checkpointFiles({ ...config, quantization_config }, change(tensors));
  if (unsigned) toUnsigned(files["model.safetensors"] as Uint8Array);
  return { files: { ...files, "tokenizer.json": "{}" }, weights, others };
}

/** Calls integer tensors unsigned, in place: their bits are the same. */
function toUnsigned(file: Uint8Array): void {
  const header = file.subarray(8, 8 + new DataView(file.buffer).getUint32(0, true));
  const text = new TextDecoder().decode(header).replaceAll(/"I(8|16)"/g, '"U$1"');
  header.set(new TextEncoder().encode(text));
}
