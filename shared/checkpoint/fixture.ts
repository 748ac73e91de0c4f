/**
 * Checkpoints made up for tests: a tiny Llama of any shape with random weights, in memory.
 *
 * @module
 */
import type { DType, TensorInfo } from "../model_config.ts";
import { DTYPE_BYTES } from "../model_config.ts";
import { gaussian, seededRandom } from "../random.ts";
import { parseModelConfig } from "./config.ts";
import { allParts, wantedTensors } from "./layout.ts";
import { encodeSafetensors, type TensorBytes } from "./safetensors.ts";

/** `config.json` of a tiny Llama: 2 layers, hidden 32, 4 heads of 8, 2 KV heads, ffn 48, 64 tokens. */
export const TINY_CONFIG = {
  architectures: ["LlamaForCausalLM"],
  model_type: "llama",
  hidden_size: 32,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  intermediate_size: 48,
  vocab_size: 64,
  max_position_embeddings: 128,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  bos_token_id: 1,
  eos_token_id: 2,
};

/**
 * Random tensors for a config: gaussian weights, norms of ones, uniform codes.
 *
 * @param dtype of the float tensors outside CodeGEMM matrices
 */
export function randomTensors(
  config: Record<string, unknown>,
  dtype: "F16" | "BF16" | "F32" = "F16",
  seed = 1,
): TensorBytes[] {
  const parsed = parseModelConfig(JSON.stringify(config));
  const random = seededRandom(seed);
  const names = new Map(
    allParts(parsed).flatMap((part) => wantedTensors(parsed, part)).map((t) => [t.name, t]),
  );
  return [...names.values()].map(({ name, shape, dtypes }) => {
    const count = shape.reduce((a, b) => a * b, 1);
    if (dtypes[0] === "I32") {
      const words = Int32Array.from({ length: count }, () => random() * 2 ** 32);
      return tensorBytes(name, "I32", shape, new Uint8Array(words.buffer));
    }
    const values = Float32Array.from(
      { length: count },
      () => shape.length === 1 ? 1 : gaussian(random) / Math.sqrt(shape.at(-1)!),
    );
    const stored = dtypes.length === 1 ? dtypes[0] : dtype;
    return tensorBytes(name, stored, shape, floatBytes(values, stored));
  });
}

/** Floats as they are stored (bfloat16 by cutting off). */
export function floatBytes(values: Float32Array<ArrayBuffer>, dtype: DType): Uint8Array {
  if (dtype === "F32") return new Uint8Array(values.buffer);
  if (dtype === "F16") return new Uint8Array(Float16Array.from(values).buffer);
  const bits = new Uint32Array(values.buffer);
  return new Uint8Array(Uint16Array.from(bits, (word) => word >>> 16).buffer);
}

/** A tensor with its size worked out. */
export function tensorBytes(
  name: string,
  dtype: DType,
  shape: number[],
  data: Uint8Array,
): TensorBytes {
  const info: TensorInfo = {
    name,
    dtype,
    shape,
    bytes: shape.reduce((a, b) => a * b, 1) * DTYPE_BYTES[dtype],
  };
  return { ...info, data };
}

/** The files of a checkpoint with a single safetensors file. */
export function checkpointFiles(
  config: Record<string, unknown>,
  tensors: readonly TensorBytes[] = randomTensors(config),
): Record<string, Uint8Array | string> {
  return {
    "config.json": JSON.stringify(config),
    "model.safetensors": encodeSafetensors(tensors),
  };
}
