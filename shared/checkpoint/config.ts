/**
 * `config.json` of a Llama-family model, parsed once into a {@linkcode ModelConfig}. What the code
 * cannot run is refused by name, never ignored.
 *
 * @module
 */
import { z } from "zod";
import { FleetError } from "../errors.ts";
import type { CodeGemmFormat, Llama3RopeScaling, ModelConfig } from "../model_config.ts";
import { ROW_SCALE } from "../model_config.ts";
import { parseJsonObject } from "./source.ts";

const size = z.number().int().min(1).max(2 ** 31 - 1);
const tokenId = z.number().int().min(0);
const tokenIds = z.union([tokenId, z.array(tokenId)]).nullish()
  .transform((ids) => ids === null || ids === undefined ? [] : [ids].flat());

const Rope = z.looseObject({
  rope_theta: z.number().positive().optional(),
  rope_type: z.string().optional(),
  /** The older spelling of `rope_type`. */
  type: z.string().optional(),
});

const Llama3Rope = z.object({
  factor: z.number().min(1),
  low_freq_factor: z.number().positive(),
  high_freq_factor: z.number().positive(),
  original_max_position_embeddings: size,
}).refine((rope) => rope.high_freq_factor > rope.low_freq_factor, {
  message: "must be larger than low_freq_factor",
  path: ["high_freq_factor"],
});

/** The section that marks a CodeGEMM checkpoint. */
const CodeGemmSection = z.object({
  group_size: z.number().int().max(2 ** 31 - 1).refine((g) => g >= 1 || g === ROW_SCALE, {
    message: `must be positive, or ${ROW_SCALE} for one scale per row`,
  }),
  vec_len: size,
  num_codebooks: size,
  nbits_per_codebook: size,
});

// Defaults are those of the `transformers` library's LlamaConfig, for keys it leaves out.
const Config = z.object({
  hidden_size: size,
  num_hidden_layers: size,
  num_attention_heads: size,
  num_key_value_heads: size.nullish(),
  head_dim: size.nullish(),
  intermediate_size: size,
  vocab_size: size,
  max_position_embeddings: size.default(2048),
  rms_norm_eps: z.number().positive().default(1e-6),
  rope_theta: z.number().positive().nullish(),
  rope_scaling: Rope.nullish(),
  rope_parameters: Rope.nullish(),
  tie_word_embeddings: z.boolean().default(false),
  bos_token_id: tokenId.nullish(),
  eos_token_id: tokenIds,
  codegemm: CodeGemmSection.nullish(),
});

/** Keys whose other values change the arithmetic in ways the kernels do not know. */
const ONLY: Record<string, readonly unknown[]> = {
  model_type: ["llama"],
  hidden_act: ["silu", undefined],
  attention_bias: [false, null, undefined],
  mlp_bias: [false, null, undefined],
  partial_rotary_factor: [1, null, undefined],
  sliding_window: [null, undefined],
};

/**
 * Parses `config.json`.
 *
 * @param jsonText the file
 * @param generationJsonText `generation_config.json` beside it, whose end-of-sequence ids count too
 * @throws FleetError `bad-checkpoint` that names the key, what it says and what it may say
 *
 * @example
 * ```ts
 * import { parseModelConfig } from "./config.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const config = parseModelConfig(JSON.stringify({
 *   model_type: "llama",
 *   hidden_size: 384,
 *   num_hidden_layers: 8,
 *   num_attention_heads: 6,
 *   num_key_value_heads: 2,
 *   intermediate_size: 1024,
 *   vocab_size: 4096,
 * }));
 * assertEquals(config.headDim, 64);
 * ```
 */
export function parseModelConfig(jsonText: string, generationJsonText?: string): ModelConfig {
  const json = parseJsonObject("config.json", jsonText);
  const bad = (what: string) => new FleetError("bad-checkpoint", `config.json: ${what}`);
  for (const [key, allowed] of Object.entries(ONLY)) {
    if (!allowed.includes(json[key])) {
      throw bad(
        `${key} is ${JSON.stringify(json[key])}; only ${JSON.stringify(allowed[0])} is supported`,
      );
    }
  }
  if (json.quantization_config) {
    const method = (json.quantization_config as Record<string, unknown>).quant_method;
    throw bad(
      method === "aqlm"
        ? "this is an AQLM checkpoint; deno task convert --in DIR --out DIR turns it into one to run"
        : `quantization_config (${
          JSON.stringify(method ?? "?")
        }) is not supported; take the float ` +
          "checkpoint, or one in CodeGEMM format",
    );
  }
  const config = parse("config.json", Config, json);

  const { hidden_size: hidden, num_attention_heads: heads } = config;
  const kvHeads = config.num_key_value_heads ?? heads;
  const headDim = config.head_dim ?? hidden / heads;
  if (heads % kvHeads !== 0) {
    throw bad(`num_attention_heads (${heads}) is no multiple of num_key_value_heads (${kvHeads})`);
  }
  if (!Number.isInteger(headDim)) {
    throw bad(
      `hidden_size (${hidden}) is no multiple of num_attention_heads (${heads}), and there is no head_dim`,
    );
  }
  if (headDim < 8 || headDim % 2 !== 0) {
    throw bad(`head_dim is ${headDim}; it must be even (RoPE turns pairs) and at least 8`);
  }
  const generation = parse(
    "generation_config.json",
    z.object({ eos_token_id: tokenIds }),
    generationJsonText === undefined
      ? {}
      : parseJsonObject("generation_config.json", generationJsonText),
  );
  const bosToken = config.bos_token_id ?? null;
  const eosTokens = [...new Set([...config.eos_token_id, ...generation.eos_token_id])];
  for (const id of [...eosTokens, bosToken ?? 0]) {
    if (id >= config.vocab_size) {
      throw bad(`token ${id} (bos or eos) is outside the vocabulary of ${config.vocab_size}`);
    }
  }
  return {
    hiddenSize: hidden,
    layers: config.num_hidden_layers,
    heads,
    kvHeads,
    headDim,
    ffnSize: config.intermediate_size,
    vocabSize: config.vocab_size,
    contextTokens: config.max_position_embeddings,
    rmsNormEps: config.rms_norm_eps,
    ...ropeOf(config),
    tiedEmbeddings: config.tie_word_embeddings,
    bosToken,
    eosTokens,
    codegemm: formatOf(config.codegemm),
  };
}

/**
 * Two spellings: `rope_theta` with `rope_scaling` beside it (until transformers 4), or both in
 * `rope_parameters` (since 5). Where both are there, the newer one counts.
 */
function ropeOf(
  config: z.output<typeof Config>,
): Pick<ModelConfig, "ropeTheta" | "ropeScaling"> {
  const newer = config.rope_parameters;
  const key = newer ? "rope_parameters" : "rope_scaling";
  const rope = newer ?? config.rope_scaling;
  return {
    ropeTheta: newer?.rope_theta ?? config.rope_theta ?? 10_000,
    ropeScaling: rope ? scalingOf(key, rope) : null,
  };
}

function scalingOf(key: string, rope: z.output<typeof Rope>): Llama3RopeScaling | null {
  const type = rope.rope_type ?? rope.type ?? "default";
  if (type === "default") return null;
  if (type !== "llama3") {
    throw new FleetError(
      "bad-checkpoint",
      `config.json: ${key} is of type ${JSON.stringify(type)}; only "llama3" is supported`,
    );
  }
  const scaling = parse(`config.json, ${key}`, Llama3Rope, rope);
  return {
    factor: scaling.factor,
    lowFreqFactor: scaling.low_freq_factor,
    highFreqFactor: scaling.high_freq_factor,
    originalContextTokens: scaling.original_max_position_embeddings,
  };
}

function formatOf(section: z.output<typeof CodeGemmSection> | null | undefined) {
  if (!section) return null;
  const format: CodeGemmFormat = {
    m: section.num_codebooks,
    v: section.vec_len,
    g: section.group_size,
    b: section.nbits_per_codebook,
  };
  return format;
}

function parse<T extends z.ZodType>(where: string, schema: T, value: unknown): z.output<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const { path, message } = result.error.issues[0];
  throw new FleetError(
    "bad-checkpoint",
    `${where}: ${path.join(".") || "the whole"}: ${message}`,
  );
}
