/**
 * Checkpoints of random weights on disk, in the shapes of real models, for benchmarks of whole
 * processes: a fleet moves, loads and runs them as it would the real ones.
 *
 * @module
 */
import { allParts, encodeHeader, wantedTensors } from "../shared/checkpoint/mod.ts";
import { parseModelConfig } from "../shared/checkpoint/mod.ts";
import { type CodeGemmFormat, DTYPE_BYTES, type TensorInfo } from "../shared/model_config.ts";
import { randomInt, seededRandom } from "../shared/random.ts";

/** `config.json` of the Llama-3 models, and of a tiny one for trying things. */
export const SHAPES = {
  "llama-3-70b": { hidden: 8192, layers: 80, heads: 64, kvHeads: 8, ffn: 28672, vocab: 128256 },
  "llama-3-8b": { hidden: 4096, layers: 32, heads: 32, kvHeads: 8, ffn: 14336, vocab: 128256 },
  tiny: { hidden: 256, layers: 4, heads: 4, kvHeads: 2, ffn: 512, vocab: 4096 },
} as const;

/** A model's name in {@linkcode SHAPES}. */
export type ShapeName = keyof typeof SHAPES;

/** What to write. */
export interface SyntheticOptions {
  shape: ShapeName;
  /** Fewer than the shape's own, for machines and times of less. */
  layers: number;
  /** `m1v4g128` and the like; null for float16 weights. */
  format: CodeGemmFormat | null;
  contextTokens: number;
  /** Fewer tokens than the shape's own, where embedding and output head are not the point. */
  vocab?: number;
}

/** Weights come in repeats of this much randomness. */
const BLOCK_BYTES = 8 * 2 ** 20;

/** Writes a checkpoint into `directory`, which exists; returns its bytes. */
export async function writeSyntheticCheckpoint(
  directory: string,
  options: SyntheticOptions,
): Promise<number> {
  const configJson = JSON.stringify(configOf(options), null, 2);
  await Deno.writeTextFile(`${directory}/config.json`, configJson);
  const config = parseModelConfig(configJson);
  const unit = 1 / Math.sqrt(config.hiddenSize);
  const blocks = {
    codes: randomBlock((random) => randomInt(random, 65536)),
    // Half of unit variance on average, so that a layer neither dies out nor grows without bound.
    values: randomBlock((random) => float16((random() - 0.5) * 3)),
    scales: randomBlock((random) => float16(unit * (0.5 + random()))),
    small: randomBlock((random) => float16((random() - 0.5) * 3 * unit)),
    ones: new Uint8Array(new Uint16Array(BLOCK_BYTES / 2).fill(float16(1)).buffer),
  };
  const blockOf = ({ name }: TensorInfo) => {
    if (name.endsWith(".codes")) return blocks.codes;
    if (name.endsWith(".codebooks")) return blocks.values;
    if (name.endsWith(".scales")) return blocks.scales;
    return name.includes("norm") ? blocks.ones : blocks.small;
  };
  const weightMap: Record<string, string> = {};
  let bytes = 0;
  for (const part of allParts(config)) {
    const file = `model-${part.replace(".", "-")}.safetensors`;
    const tensors = wantedTensors(config, part).map(({ name, shape, dtypes }): TensorInfo => {
      const [dtype] = dtypes;
      return { name, dtype, shape, bytes: shape.reduce((a, b) => a * b, DTYPE_BYTES[dtype]) };
    });
    using out = await Deno.open(`${directory}/${file}`, { write: true, create: true });
    await writeAll(out, encodeHeader(tensors));
    for (const tensor of tensors) {
      weightMap[tensor.name] = file;
      bytes += tensor.bytes;
      const block = blockOf(tensor);
      for (let at = 0; at < tensor.bytes; at += BLOCK_BYTES) {
        await writeAll(out, block.subarray(0, Math.min(BLOCK_BYTES, tensor.bytes - at)));
      }
    }
  }
  const index = { metadata: { total_size: bytes }, weight_map: weightMap };
  await Deno.writeTextFile(`${directory}/model.safetensors.index.json`, JSON.stringify(index));
  return bytes;
}

function configOf({ shape, layers, format, contextTokens, vocab }: SyntheticOptions) {
  const { hidden, heads, kvHeads, ffn } = SHAPES[shape];
  return {
    architectures: ["LlamaForCausalLM"],
    model_type: "llama",
    hidden_act: "silu",
    hidden_size: hidden,
    intermediate_size: ffn,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: hidden / heads,
    vocab_size: vocab ?? SHAPES[shape].vocab,
    max_position_embeddings: contextTokens,
    rms_norm_eps: 1e-5,
    rope_theta: 500000,
    tie_word_embeddings: false,
    bos_token_id: 0,
    eos_token_id: 1,
    ...(format && {
      codegemm: {
        num_codebooks: format.m,
        vec_len: format.v,
        group_size: format.g,
        nbits_per_codebook: format.b,
      },
    }),
  };
}

function randomBlock(draw: (random: () => number) => number): Uint8Array<ArrayBuffer> {
  const random = seededRandom(1);
  return new Uint8Array(Uint16Array.from({ length: BLOCK_BYTES / 2 }, () => draw(random)).buffer);
}

const half = new Float16Array(1), bits = new Uint16Array(half.buffer);

function float16(value: number): number {
  half[0] = value;
  return bits[0];
}

async function writeAll(file: Deno.FsFile, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
}
