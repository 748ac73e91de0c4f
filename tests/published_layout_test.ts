/**
 * A checkpoint in CodeGEMM's published layout, written here byte by byte as its description says and
 * with none of the project's writers, runs unconverted, as the float model of its weights.
 */
import { assert, assertLess } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { loadReference } from "../model/reference.ts";
import { type ChainRow, StageChain, stepBatch } from "../model/stage_chain.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { checkpointFiles, floatBytes, tensorBytes } from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { randomInt, seededRandom } from "../shared/random.ts";

const HIDDEN = 64, FFN = 96, VOCAB = 48, CENTROIDS = 256;
const CONFIG = {
  architectures: ["LlamaForCausalLM"],
  model_type: "llama",
  torch_dtype: "float16",
  hidden_size: HIDDEN,
  intermediate_size: FFN,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: VOCAB,
  max_position_embeddings: 64,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  bos_token_id: 0,
  eos_token_id: 1,
  tie_word_embeddings: false,
};
/** `[N, K]` of a layer's matrices. */
const MATRICES: Record<string, [n: number, k: number]> = {
  "self_attn.q_proj": [64, HIDDEN],
  "self_attn.k_proj": [32, HIDDEN],
  "self_attn.v_proj": [32, HIDDEN],
  "self_attn.o_proj": [HIDDEN, 64],
  "mlp.gate_proj": [FFN, HIDDEN],
  "mlp.up_proj": [FFN, HIDDEN],
  "mlp.down_proj": [HIDDEN, FFN],
};
const LIMITS = { maxRows: 16, maxSequences: 1, maxOutputs: 16, pages: 1, contextTokens: 32 };
const TOKENS = [3, 14, 15, 9, 26, 35, 8, 9, 7, 9, 32, 38];
const PREFILLED = 8;

interface Format {
  m: number;
  v: number;
  g: number;
}
interface Entry {
  name: string;
  dtype: "F16" | "I32";
  shape: number[];
  data: Uint8Array<ArrayBuffer>;
}

/** The file as the safetensors format says: length of the header, header, tensors end to end. */
function safetensors(entries: readonly Entry[]): Uint8Array<ArrayBuffer> {
  let at = 0;
  const header: Record<string, unknown> = { __metadata__: { format: "pt" } };
  for (const { name, dtype, shape, data } of entries) {
    header[name] = { dtype, shape, data_offsets: [at, at += data.length] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const out = new Uint8Array(8 + text.length + at);
  new DataView(out.buffer).setBigUint64(0, BigInt(text.length), true);
  out.set(text, 8);
  let place = 8 + text.length;
  for (const { data } of entries) {
    out.set(data, place);
    place += data.length;
  }
  return out;
}

/** A model's tensors in the published layout, and the float weights that its codes stand for. */
function randomModel({ m, v, g }: Format) {
  const random = seededRandom(5);
  const uniform = (count: number, unit: number) =>
    Float16Array.from({ length: count }, () => (2 * random() - 1) * unit);
  const half = (name: string, shape: number[], values: Float16Array<ArrayBuffer>): Entry => ({
    name,
    dtype: "F16",
    shape,
    data: new Uint8Array(values.buffer),
  });
  const ones = (name: string) => half(name, [HIDDEN], new Float16Array(HIDDEN).fill(1));
  const ends = [
    half("model.embed_tokens.weight", [VOCAB, HIDDEN], uniform(VOCAB * HIDDEN, 1)),
    ones("model.norm.weight"),
    half("lm_head.weight", [VOCAB, HIDDEN], uniform(VOCAB * HIDDEN, 0.5)),
  ];
  const layers: Entry[][] = [],
    weights = new Map<string, [shape: number[], Float32Array<ArrayBuffer>]>();
  for (let layer = 0; layer < CONFIG.num_hidden_layers; layer++) {
    const prefix = `model.layers.${layer}`;
    const entries = [
      ones(`${prefix}.input_layernorm.weight`),
      ones(`${prefix}.post_attention_layernorm.weight`),
    ];
    for (const [name, [n, k]] of Object.entries(MATRICES)) {
      // Words are signed: a fourth code of 128 or more makes one negative.
      const words = new DataView(new ArrayBuffer(m * k / v / 4 * n * 4));
      const books = uniform(m * CENTROIDS * v, 1), scales = uniform(k / g * n, 0.2);
      const dense = new Float32Array(n * k);
      for (let j = 0; j < m; j++) {
        for (let i = 0; i < k / v; i++) {
          for (let row = 0; row < n; row++) {
            const code = randomInt(random, CENTROIDS);
            const word = (j * (k / v / 4) + Math.floor(i / 4)) * n + row;
            words.setUint8(4 * word + i % 4, code); // Lowest byte first.
            for (let d = 0; d < v; d++) {
              dense[row * k + i * v + d] += scales[Math.floor(i * v / g) * n + row] *
                books[(j * CENTROIDS + code) * v + d];
            }
          }
        }
      }
      const data = new Uint8Array(words.buffer);
      entries.push(
        { name: `${prefix}.${name}.codes`, dtype: "I32", shape: [m, k / v / 4, n], data },
        half(`${prefix}.${name}.codebooks`, [m, CENTROIDS, v], books),
        half(`${prefix}.${name}.scales`, [k / g, n], scales),
      );
      weights.set(`${prefix}.${name}.weight`, [[n, k], dense]);
    }
    layers.push(entries);
  }
  return { shards: [[...ends, ...layers[0]], ...layers.slice(1)], weights };
}

async function write(path: string, shards: Entry[][], { m, v, g }: Format): Promise<void> {
  const codegemm = {
    group_size: g,
    vec_len: v,
    num_codebooks: m,
    nbits_per_codebook: 8,
    arch_config: {
      layers_name: "layers",
      model_name: "model",
      module_names: Object.keys(MATRICES),
    },
  };
  await Deno.writeTextFile(`${path}/config.json`, JSON.stringify({ ...CONFIG, codegemm }));
  const weightMap: Record<string, string> = {};
  for (const [at, entries] of shards.entries()) {
    const file = `model-0000${at + 1}-of-0000${shards.length}.safetensors`;
    for (const { name } of entries) weightMap[name] = file;
    await Deno.writeFile(`${path}/${file}`, safetensors(entries));
  }
  const index = { metadata: { total_size: 0 }, weight_map: weightMap };
  await Deno.writeTextFile(`${path}/model.safetensors.index.json`, JSON.stringify(index));
}

/** What the float model of the same weights says after each token. */
async function wantedLogits(
  shards: Entry[][],
  weights: ReturnType<typeof randomModel>["weights"],
): Promise<ArrayLike<number>[]> {
  const floats = shards.flat().filter(({ name }) => name.endsWith(".weight"))
    .map(({ name, dtype, shape, data }) => tensorBytes(name, dtype, shape, data));
  for (const [name, [shape, values]] of weights) {
    floats.push(tensorBytes(name, "F32", shape, floatBytes(values, "F32")));
  }
  const checkpoint = await openCheckpoint(memorySource(checkpointFiles(CONFIG, floats)));
  return (await loadReference(checkpoint.config, checkpoint)).logits(TOKENS);
}

for (
  const [name, format] of Object.entries({
    m1v4g32: { m: 1, v: 4, g: 32 },
    m2v8g32: { m: 2, v: 8, g: 32 },
  })
) {
  Deno.test(`a directory in the published layout runs as the float model of its weights: ${name}`, async () => {
    const { shards, weights } = randomModel(format);
    const wanted = await wantedLogits(shards, weights);
    const path = await Deno.makeTempDir();
    const gpu = await Gpu.open({ software: true, limits: "default" });
    try {
      await write(path, shards, format);
      const checkpoint = await openCheckpoint(directorySource(path));
      const chain = await StageChain.load({
        gpu,
        config: checkpoint.config,
        tensors: checkpoint,
        limits: LIMITS,
      });
      const rows = TOKENS.map((token, position): ChainRow => ({
        sequence: 0,
        position,
        token,
        request: { type: "logits" },
      }));
      const pages = [Uint32Array.of(0)];
      const steps = [stepBatch(pages, rows.slice(0, PREFILLED), 0)];
      for (const row of rows.slice(PREFILLED)) steps.push(stepBatch(pages, [row], 1));
      let at = 0, worst = 0, spread = 0;
      for (const step of steps) {
        for (const result of (await chain.step(step)).results) {
          assert(result.type === "logits");
          result.logits.forEach((logit, i) => {
            worst = Math.max(worst, Math.abs(logit - wanted[at][i]));
            spread = Math.max(spread, Math.abs(wanted[at][i]));
          });
          at++;
        }
      }
      assert(at === TOKENS.length && spread > 1, `logits of ${spread} at most tell nothing`);
      assertLess(worst, 0.01 * spread);
      chain.destroy();
      gpu.check();
    } finally {
      gpu.close();
      await Deno.remove(path, { recursive: true });
    }
  });
}
