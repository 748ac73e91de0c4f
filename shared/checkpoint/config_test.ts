import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { FleetError } from "../errors.ts";
import { parseModelConfig } from "./config.ts";
import { TINY_CONFIG } from "./fixture.ts";

const parse = (changes: Record<string, unknown>, generation?: unknown) =>
  parseModelConfig(
    JSON.stringify({ ...TINY_CONFIG, ...changes }),
    generation === undefined ? undefined : JSON.stringify(generation),
  );

const LLAMA31_ROPE = {
  factor: 8.0,
  low_freq_factor: 1.0,
  high_freq_factor: 4.0,
  original_max_position_embeddings: 8192,
};
const LLAMA31 = {
  factor: 8,
  lowFreqFactor: 1,
  highFreqFactor: 4,
  originalContextTokens: 8192,
};

Deno.test("a config is read into one spelling, with the library's defaults", () => {
  assertEquals(parse({}), {
    hiddenSize: 32,
    layers: 2,
    heads: 4,
    kvHeads: 2,
    headDim: 8,
    ffnSize: 48,
    vocabSize: 64,
    contextTokens: 128,
    rmsNormEps: 1e-5,
    ropeTheta: 10000,
    ropeScaling: null,
    tiedEmbeddings: false,
    bosToken: 1,
    eosTokens: [2],
    codegemm: null,
  });
  const bare = parse({
    num_key_value_heads: undefined,
    rope_theta: undefined,
    rms_norm_eps: undefined,
    max_position_embeddings: undefined,
    bos_token_id: null,
    eos_token_id: null,
  });
  assertEquals(
    [bare.kvHeads, bare.ropeTheta, bare.rmsNormEps, bare.contextTokens, bare.bosToken],
    [4, 10000, 1e-6, 2048, null],
  );
  assertEquals(bare.eosTokens, []);
});

Deno.test("head_dim counts where it is given, and need not be hidden over heads", () => {
  assertEquals(parse({ head_dim: 64 }).headDim, 64);
  assertEquals(parse({ head_dim: null }).headDim, 8);
});

Deno.test("RoPE in the older and the newer spelling", () => {
  assertEquals(parse({ rope_theta: 5e5 }).ropeTheta, 5e5);
  for (const key of ["rope_type", "type"]) {
    const config = parse({ rope_theta: 5e5, rope_scaling: { [key]: "llama3", ...LLAMA31_ROPE } });
    assertEquals([config.ropeTheta, config.ropeScaling], [5e5, LLAMA31]);
  }
  const newer = parse({
    rope_theta: undefined,
    rope_parameters: { rope_type: "llama3", rope_theta: 5e5, ...LLAMA31_ROPE },
  });
  assertEquals([newer.ropeTheta, newer.ropeScaling], [5e5, LLAMA31]);
  const plain = parse({ rope_parameters: { rope_theta: 1e6, rope_type: "default" } });
  assertEquals([plain.ropeTheta, plain.ropeScaling], [1e6, null]);
  assertEquals(parse({ rope_scaling: null }).ropeScaling, null);
  assertEquals(parse({ rope_scaling: { rope_type: "default" } }).ropeScaling, null);
});

Deno.test("end-of-sequence ids of config.json and generation_config.json are merged", () => {
  assertEquals(parse({ eos_token_id: [2, 3] }).eosTokens, [2, 3]);
  assertEquals(parse({}, { eos_token_id: [3, 2, 9] }).eosTokens, [2, 3, 9]);
  assertEquals(parse({}, { eos_token_id: 5 }).eosTokens, [2, 5]);
  assertEquals(parse({}, {}).eosTokens, [2]);
});

Deno.test("a codegemm section becomes a format", () => {
  const codegemm = {
    group_size: 128,
    vec_len: 4,
    num_codebooks: 1,
    nbits_per_codebook: 8,
    arch_config: { model_name: "model" },
  };
  assertEquals(parse({ codegemm }).codegemm, { m: 1, v: 4, g: 128, b: 8 });
  const wide = { group_size: -1, vec_len: 8, num_codebooks: 1, nbits_per_codebook: 16 };
  assertEquals(parse({ codegemm: wide }).codegemm, { m: 1, v: 8, g: -1, b: 16 });
});

Deno.test("what the code cannot run is refused by name", () => {
  const refusals: [Record<string, unknown>, ...string[]][] = [
    [{ model_type: "qwen2" }, "model_type", "qwen2", "llama"],
    [{ model_type: undefined }, "model_type"],
    [{ hidden_act: "gelu" }, "hidden_act", "gelu", "silu"],
    [{ attention_bias: true }, "attention_bias"],
    [{ mlp_bias: true }, "mlp_bias"],
    [{ rope_scaling: { rope_type: "yarn", factor: 4 } }, "rope_scaling", "yarn"],
    [{ rope_parameters: { rope_type: "dynamic", factor: 4 } }, "rope_parameters", "dynamic"],
    [{ rope_scaling: { rope_type: "llama3", factor: 8 } }, "rope_scaling", "low_freq_factor"],
    [
      { rope_scaling: { type: "llama3", ...LLAMA31_ROPE, high_freq_factor: 1 } },
      "high_freq_factor",
      "larger",
    ],
    [{ quantization_config: { quant_method: "gptq" } }, "quantization_config", "gptq"],
    [{ quantization_config: { quant_method: "aqlm" } }, "AQLM", "deno task convert"],
    [{ sliding_window: 4096 }, "sliding_window"],
    [{ num_key_value_heads: 3 }, "num_attention_heads (4)", "num_key_value_heads (3)"],
    [{ hidden_size: 34 }, "hidden_size (34)"],
    [{ head_dim: 9 }, "head_dim"],
    [{ head_dim: 4 }, "head_dim"],
    [{ hidden_size: undefined }, "hidden_size"],
    [{ hidden_size: "32" }, "hidden_size"],
    [{ num_hidden_layers: 0 }, "num_hidden_layers"],
    [{ num_hidden_layers: 2.5 }, "num_hidden_layers"],
    [{ vocab_size: 1e300 }, "vocab_size"],
    [{ eos_token_id: 64 }, "token 64", "vocabulary of 64"],
    [{ bos_token_id: -1 }, "bos_token_id"],
    [{ codegemm: { group_size: 128 } }, "codegemm"],
    [
      { codegemm: { group_size: -2, vec_len: 4, num_codebooks: 1, nbits_per_codebook: 8 } },
      "group_size",
      "-1 for one scale per row",
    ],
  ];
  for (const [changes, ...words] of refusals) {
    const error = assertThrows(() => parse(changes), FleetError);
    assertEquals(error.code, "bad-checkpoint");
    for (const word of ["config.json", ...words]) assertStringIncludes(error.message, word);
  }
  assertThrows(() => parseModelConfig("{"), FleetError, "config.json is not JSON");
  assertThrows(() => parseModelConfig("[1]"), FleetError, "config.json is not a JSON object");
  assertThrows(() => parse({}, { eos_token_id: "x" }), FleetError, "generation_config.json");
});
