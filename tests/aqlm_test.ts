import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { loadReference } from "../model/reference.ts";
import { type ChainRow, StageChain, stepBatch } from "../model/stage_chain.ts";
import { aqlmFixture } from "../quantize/aqlm_fixture.ts";
import { convertAqlm } from "../quantize/convert.ts";
import { directorySink } from "../quantize/directory.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { checkpointFiles, floatBytes, tensorBytes } from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint, parseModelConfig } from "../shared/checkpoint/mod.ts";
import { LINEAR_NAMES, linearShape } from "../shared/model_config.ts";
import type { NumericsProfile } from "../shared/protocol.ts";

const CONFIG = {
  architectures: ["LlamaForCausalLM"],
  model_type: "llama",
  num_hidden_layers: 1,
  vocab_size: 61,
  max_position_embeddings: 64,
  rms_norm_eps: 1e-5,
  bos_token_id: 0,
  eos_token_id: 1,
};
const SIZES = {
  /** Multiples of no more than AQLM's 1x16 asks for: two codes of 8 weights along K. */
  "of odd sizes": {
    hidden_size: 48,
    num_attention_heads: 8,
    num_key_value_heads: 1,
    head_dim: 10,
    intermediate_size: 176,
  },
  /** Queries, keys and values are one matrix of three codebooks, gate and up one of two. */
  "of stacked matrices": {
    hidden_size: 80,
    num_attention_heads: 8,
    num_key_value_heads: 4,
    head_dim: 64,
    intermediate_size: 256,
  },
};
const LIMITS = { maxRows: 16, maxSequences: 4, maxOutputs: 16, pages: 8, contextTokens: 32 };
const TOKENS = [3, 14, 15, 9, 26, 53, 58, 9, 7, 9, 32, 38];
const PREFILLED = 8;

/** The logits that follow TOKENS: the first of them prefilled, the rest decoded, `mates` beside each. */
async function logitsOf(
  chain: StageChain,
  mates: number,
): Promise<Float32Array<ArrayBuffer>[]> {
  const pages = [0, 1, 2, 3].map((s) => Uint32Array.of(s));
  const row = (sequence: number, position: number): ChainRow => ({
    sequence,
    position,
    token: TOKENS[(position + 5 * sequence) % TOKENS.length],
    request: { type: "logits" },
  });
  const step = async (rows: ChainRow[], decodeRows: number) => {
    const { results } = await chain.step(stepBatch(pages, rows, decodeRows));
    return results.map((result) => {
      assert(result.type === "logits");
      return result.logits.slice();
    });
  };
  const sequences = Array.from({ length: 1 + mates }, (_, s) => s);
  const answers: Float32Array<ArrayBuffer>[] = [];
  for (const s of sequences) {
    const rows = Array.from({ length: PREFILLED }, (_, position) => row(s, position));
    const logits = await step(rows, 0);
    if (s === 0) answers.push(...logits);
  }
  for (let position = PREFILLED; position < TOKENS.length; position++) {
    const rows = sequences.map((s) => row(s, position));
    answers.push((await step(rows, rows.length))[0]);
  }
  return answers;
}

for (const [name, sizes] of Object.entries(SIZES)) {
  Deno.test(`an AQLM 1x16 directory runs as the float model of its weights: ${name}`, () =>
    runsAsFloat({ ...CONFIG, ...sizes }));
}

async function runsAsFloat(sizes: Record<string, unknown>): Promise<void> {
  const { files, weights, others } = aqlmFixture(sizes, { m: 1, v: 8, b: 16 });
  const shapes = parseModelConfig(JSON.stringify(sizes));
  const dense = [...weights].map(([matrix, values]) => {
    const shape = linearShape(shapes, LINEAR_NAMES.find((name) => matrix.endsWith(name))!);
    const bytes = floatBytes(Float32Array.from(values), "F32");
    return tensorBytes(`${matrix}.weight`, "F32", shape, bytes);
  });
  const floats = await openCheckpoint(memorySource(checkpointFiles(sizes, [...others, ...dense])));
  const reference = await loadReference(floats.config, floats);
  const wanted = reference.logits(TOKENS);

  const path = await Deno.makeTempDir();
  const gpu = await Gpu.open({ software: true, limits: "default" });
  try {
    await Deno.mkdir(`${path}/aqlm`);
    for (const [name, content] of Object.entries(files)) {
      const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
      await Deno.writeFile(`${path}/aqlm/${name}`, bytes);
    }
    const sink = await directorySink(`${path}/ours`);
    await convertAqlm(directorySource(`${path}/aqlm`), sink, 2 ** 30);
    const checkpoint = await openCheckpoint(directorySource(`${path}/ours`));
    const { config } = checkpoint;
    const bits: Uint32Array[][] = [];
    for (const decode of ["codegemm", "dequantize"] as const) {
      const profile: NumericsProfile = { version: 1, decode };
      const chain = await StageChain.load({
        gpu,
        config,
        tensors: checkpoint,
        limits: LIMITS,
        profile,
      });
      for (const mates of [0, 1, 3]) {
        const got = await logitsOf(chain, mates);
        bits.push(got.map((logits) => new Uint32Array(logits.buffer)));
        let worst = 0, spread = 0;
        got.forEach((logits, at) =>
          logits.forEach((logit, i) => {
            worst = Math.max(worst, Math.abs(logit - wanted[at][i]));
            spread = Math.max(spread, Math.abs(wanted[at][i]));
          })
        );
        assert(spread > 1, `logits of ${spread} at most tell nothing`);
        assertAlmostEquals(worst, 0, 0.01 * spread, `${decode}, ${mates} beside it`);
      }
      chain.destroy();
    }
    // Neither company nor the plan's kernel family changes a bit.
    for (const other of bits) assertEquals(other, bits[0]);
    gpu.check();
  } finally {
    gpu.close();
    await Deno.remove(path, { recursive: true });
  }
}
