/**
 * A checkpoint of a few kilobytes for tests.
 *
 * @module
 */
import {
  type Checkpoint,
  encodeSafetensors,
  memorySource,
  openCheckpoint,
} from "./checkpoint/mod.ts";
import { LINEAR_NAMES, linearShape, type ModelConfig } from "./model_config.ts";
import { randomInt, seededRandom } from "./random.ts";

/** A float checkpoint of two layers with random bits. */
export function tinyCheckpoint(
  options: { tied?: boolean; seed?: number } = {},
): Promise<Checkpoint> {
  const random = seededRandom(options.seed ?? 1);
  const config = {
    model_type: "llama",
    architectures: ["LlamaForCausalLM"],
    hidden_size: 16,
    num_hidden_layers: 2,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    head_dim: 8,
    intermediate_size: 24,
    vocab_size: 65,
    max_position_embeddings: 64,
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    tie_word_embeddings: options.tied ?? false,
    torch_dtype: "float16",
  };
  const shapes: [name: string, shape: number[]][] = [["model.embed_tokens.weight", [65, 16]]];
  const parsed = {
    hiddenSize: 16,
    heads: 2,
    kvHeads: 1,
    headDim: 8,
    ffnSize: 24,
  } as ModelConfig;
  for (let layer = 0; layer < 2; layer++) {
    const prefix = `model.layers.${layer}`;
    shapes.push([`${prefix}.input_layernorm.weight`, [16]]);
    shapes.push([`${prefix}.post_attention_layernorm.weight`, [16]]);
    for (const name of LINEAR_NAMES) {
      shapes.push([`${prefix}.${name}.weight`, linearShape(parsed, name)]);
    }
  }
  shapes.push(["model.norm.weight", [16]]);
  if (!options.tied) shapes.push(["lm_head.weight", [65, 16]]);
  const file = encodeSafetensors(shapes.map(([name, shape]) => {
    const bytes = 2 * shape.reduce((a, b) => a * b);
    const data = Uint8Array.from({ length: bytes }, () => randomInt(random, 120));
    return { name, dtype: "F16" as const, shape, bytes, data };
  }));
  return openCheckpoint(
    memorySource({ "config.json": JSON.stringify(config), "model.safetensors": file }),
  );
}
