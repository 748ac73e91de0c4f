/**
 * Tiny models of random weights, in memory: for tests that need a model and not its sense.
 *
 * @module
 */
import { wantedTensors } from "../../shared/checkpoint/mod.ts";
import { FleetError } from "../../shared/errors.ts";
import {
  type DType,
  DTYPE_BYTES,
  LINEAR_NAMES,
  linearShape,
  type ModelConfig,
  type PartName,
  type TensorInfo,
  type TensorSource,
} from "../../shared/model_config.ts";
import { gaussian, type Random, randomInt, seededRandom } from "../../shared/random.ts";

/** A model of odd sizes; `overrides` replaces what a test is about. */
export function tinyConfig(overrides: Partial<ModelConfig> = {}): ModelConfig {
  return {
    hiddenSize: 64,
    layers: 3,
    heads: 6,
    kvHeads: 2,
    headDim: 8,
    ffnSize: 172,
    vocabSize: 101,
    contextTokens: 512,
    rmsNormEps: 1e-5,
    ropeTheta: 10_000,
    ropeScaling: null,
    tiedEmbeddings: false,
    bosToken: 0,
    eosTokens: [1],
    codegemm: null,
    ...overrides,
  };
}

/** The `config.json` that parses to `config`. */
export function configJson(config: ModelConfig): string {
  const { ropeScaling: rope, codegemm } = config;
  return JSON.stringify({
    architectures: ["LlamaForCausalLM"],
    model_type: "llama",
    hidden_act: "silu",
    hidden_size: config.hiddenSize,
    num_hidden_layers: config.layers,
    num_attention_heads: config.heads,
    num_key_value_heads: config.kvHeads,
    head_dim: config.headDim,
    intermediate_size: config.ffnSize,
    vocab_size: config.vocabSize,
    max_position_embeddings: config.contextTokens,
    rms_norm_eps: config.rmsNormEps,
    rope_theta: config.ropeTheta,
    rope_scaling: rope && {
      rope_type: "llama3",
      factor: rope.factor,
      low_freq_factor: rope.lowFreqFactor,
      high_freq_factor: rope.highFreqFactor,
      original_max_position_embeddings: rope.originalContextTokens,
    },
    tie_word_embeddings: config.tiedEmbeddings,
    bos_token_id: config.bosToken,
    eos_token_id: config.eosTokens,
    codegemm: codegemm && {
      group_size: codegemm.g,
      vec_len: codegemm.v,
      num_codebooks: codegemm.m,
      nbits_per_codebook: codegemm.b,
    },
  });
}

/** A model in memory. */
export interface RandomModel extends TensorSource {
  readonly config: ModelConfig;
  readonly configJson: string;
}

/**
 * All tensors of a model of this config, drawn from `seed`. Float tensors are float16; weights are
 * scaled so that activations neither die nor explode, and logits differ enough to tell tokens apart.
 */
export function randomModel(config: ModelConfig, seed: number): RandomModel {
  const random = seededRandom(seed);
  const tensors = new Map<string, { info: TensorInfo; bytes: Uint8Array<ArrayBuffer> }>();
  const layers = Array.from({ length: config.layers }, (_, i): PartName => `layer.${i}`);
  for (const part of ["embedding", ...layers, "head"] as PartName[]) {
    for (const { name, shape, dtypes } of wantedTensors(config, part)) {
      if (tensors.has(name)) continue;
      const dtype = dtypes[0];
      const bytes = randomTensor(random, config, name, dtype, shape);
      tensors.set(name, { info: { name, dtype, shape, bytes: bytes.length }, bytes });
    }
  }
  const tensor = (name: string) => {
    const found = tensors.get(name);
    if (!found) throw new FleetError("bad-checkpoint", `There is no tensor ${name}`);
    return found;
  };
  return {
    config,
    configJson: configJson(config),
    names: () => [...tensors.keys()],
    has: (name) => tensors.has(name),
    info: (name) => tensor(name).info,
    // deno-lint-ignore require-await -- async, so that a missing tensor rejects instead of throwing
    read: async (name, offset, length) => tensor(name).bytes.slice(offset, offset + length),
  };
}

function randomTensor(
  random: Random,
  config: ModelConfig,
  name: string,
  dtype: DType,
  shape: number[],
): Uint8Array<ArrayBuffer> {
  const elements = shape.reduce((product, size) => product * size, 1);
  if (dtype !== "F16") {
    return Uint8Array.from({ length: elements * DTYPE_BYTES[dtype] }, () => randomInt(random, 256));
  }
  const values = Float16Array.from(
    { length: elements },
    () => elementOf(random, config, name, shape),
  );
  return new Uint8Array(values.buffer);
}

function elementOf(random: Random, config: ModelConfig, name: string, shape: number[]): number {
  if (name.endsWith("norm.weight")) return 1 + 0.2 * gaussian(random);
  if (name.endsWith(".codebooks")) return gaussian(random) / Math.sqrt(shape[0]);
  if (name.endsWith(".scales")) {
    const linear = LINEAR_NAMES.find((each) => name.endsWith(`.${each}.scales`))!;
    return (0.5 + random()) / Math.sqrt(linearShape(config, linear)[1]);
  }
  if (name === "model.embed_tokens.weight") return gaussian(random);
  return 1.5 * gaussian(random) / Math.sqrt(shape[1]);
}
