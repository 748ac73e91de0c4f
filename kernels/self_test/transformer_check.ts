/**
 * The kernels around the linear layers against their references: embedding, norms, RoPE and paged
 * attention for both kinds of rows, SwiGLU.
 *
 * @module
 */
import type { RowRequest, StepBatch } from "../../shared/frames.ts";
import { gaussian, type Random, seededRandom } from "../../shared/random.ts";
import {
  createDecodeAttention,
  createDecodeScratch,
  createEmbedding,
  createFinalNorm,
  createPrefillAttention,
  createRmsNorm,
  createRope,
  createSwiGlu,
  destroyDecodeScratch,
  headShape,
  kvPageBytes,
  ropeAngles,
  ropeFrequencies,
  StepBuffers,
  tileRows,
} from "../transformer/mod.ts";
import {
  attentionReference,
  rmsNormReference,
  ropeReference,
  roundF16,
  swigluReference,
} from "../transformer/reference.ts";
import type { Workbench } from "../workbench.ts";
import { type Comparison, float16Tolerance } from "./check.ts";

const LIMITS = { maxRows: 48, maxSequences: 1, maxOutputs: 4, pages: 4, contextTokens: 128 };

function normals(random: Random, count: number): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: count }, () => gaussian(random));
}

/** Rows of one sequence at positions `[from, from + rows)`, all of one kind. */
function batchOf(
  kind: "decode" | "prefill",
  from: number,
  tokens: number[],
  outputs: number[] = [],
): StepBatch {
  const rows = tokens.length;
  return {
    sequences: [{ pages: Uint32Array.of(2, 0, 3) }],
    rowSequence: new Uint16Array(rows),
    rowPosition: Uint32Array.from({ length: rows }, (_, row) => from + row),
    rowToken: Uint32Array.from(tokens),
    decodeRows: kind === "decode" ? rows : 0,
    requests: outputs.map((row): RowRequest => ({ type: "logits", row })),
  };
}

function float16Comparison(kernel: string, raw: ArrayBuffer, expected: number[]): Comparison {
  return {
    kernel,
    actual: new Float16Array(raw),
    expected,
    tolerance: float16Tolerance(expected),
    raw,
  };
}

/** Embedding, then the norm of all rows and of two gathered ones. */
export async function checkEmbeddingAndNorms(bench: Workbench): Promise<Comparison[]> {
  const { gpu } = bench, hidden = 72, vocab = 20, cut = 9, epsilon = 1e-5;
  const tokens = [0, 8, 9, 19, 8], outputs = [4, 2];
  const random = seededRandom(31);
  const table = Float16Array.from(normals(random, vocab * hidden)) as Float16Array<ArrayBuffer>;
  const gains = normals(random, hidden);
  const inputs = bench.keep(new StepBuffers(gpu, LIMITS, 16));
  const residual = bench.storage("residual", tokens.length * hidden * 4);
  const weight = bench.upload("gains", gains);
  const normed = bench.storage("normed", tokens.length * hidden * 2);
  const gathered = bench.storage("gathered", outputs.length * hidden * 2);
  const pieces = [[0, cut], [cut, vocab]].map(([from, to]) => ({
    buffer: bench.upload("embedding", table.slice(from * hidden, to * hidden)),
    firstToken: from,
    tokens: to - from,
  }));
  const norm = { gpu, inputs, hidden, epsilon, residual, weight };
  bench.run(
    inputs.write(batchOf("prefill", 0, tokens, outputs)),
    await createEmbedding({ gpu, inputs, pieces, hidden, residual }),
    await createRmsNorm({ ...norm, normed }),
    await createFinalNorm({ ...norm, normed: gathered }),
  );
  const rows = tokens.map((token) => table.subarray(token * hidden, (token + 1) * hidden));
  const normedRows = rows.map((row) => [...rmsNormReference(row, gains, epsilon)]);
  const embedded = await gpu.read(residual, tokens.length * hidden * 4);
  return [
    {
      kernel: "embedding",
      actual: new Float32Array(embedded),
      expected: rows.flatMap((row) => [...row]),
      tolerance: () => 0,
      raw: embedded,
    },
    float16Comparison(
      "norm",
      await gpu.read(normed, tokens.length * hidden * 2),
      normedRows.flat(),
    ),
    float16Comparison(
      "final norm",
      await gpu.read(gathered, outputs.length * hidden * 2),
      outputs.flatMap((row) => normedRows[row]),
    ),
  ];
}

/** `silu(gate) * up`. */
export async function checkSwiGlu(bench: Workbench): Promise<Comparison[]> {
  const { gpu } = bench, width = 52, rows = 3;
  const gateUp = normals(seededRandom(32), rows * 2 * width).map((value) => 4 * value);
  const inputs = bench.keep(new StepBuffers(gpu, LIMITS, 16));
  const gated = bench.storage("gated", rows * width * 2);
  const kernel = await createSwiGlu({
    gpu,
    inputs,
    width,
    gateUp: bench.upload("gate up", gateUp),
    gated,
  });
  bench.run(inputs.write(batchOf("prefill", 0, [0, 0, 0])), kernel);
  const expected = Array.from({ length: rows * width }, (_, i) => {
    const at = Math.floor(i / width) * 2 * width + i % width;
    return swigluReference(gateUp[at], gateUp[at + width]);
  });
  return [float16Comparison("swiglu", await gpu.read(gated, rows * width * 2), expected)];
}

/** A prompt of two pages in one step, then two decode rows behind it. */
export async function checkAttention(bench: Workbench): Promise<Comparison[]> {
  const { gpu } = bench, prompt = 40, rows = prompt + 2;
  const shape = headShape({ heads: 4, kvHeads: 2, headDim: 16 });
  const rope = { headDim: shape.headDim, theta: 10_000, scaling: null };
  const width = (shape.heads + 2 * shape.kvHeads) * shape.headDim;
  const attendedBytes = shape.heads * shape.headDim * 2;
  const rowValues = normals(seededRandom(33), rows * width);
  const inputs = bench.keep(new StepBuffers(gpu, LIMITS, tileRows(shape)));
  const buffers = {
    qkv: bench.storage("qkv", prompt * width * 4),
    keys: bench.storage("keys", LIMITS.pages * kvPageBytes(shape)),
    values: bench.storage("values", LIMITS.pages * kvPageBytes(shape)),
  };
  const attended = bench.storage("attended", prompt * attendedBytes);
  const angles = bench.upload("angles", ropeAngles(rope, LIMITS.contextTokens));
  const scratch = createDecodeScratch(gpu, shape, LIMITS);
  bench.keep({ destroy: () => destroyDecodeScratch(scratch) });
  const options = { gpu, inputs, shape, ...buffers };
  const turn = await createRope({ ...options, angles });
  const decode = await createDecodeAttention({ ...options, attended, scratch });
  const prefill = await createPrefillAttention({ ...options, attended });

  const step = (kind: "decode" | "prefill", from: number, to: number) => {
    gpu.write(buffers.qkv, 0, rowValues.subarray(from * width, to * width));
    bench.run(
      inputs.write(batchOf(kind, from, Array(to - from).fill(0))),
      turn,
      kind === "decode" ? decode : prefill,
    );
    return gpu.read(attended, (to - from) * attendedBytes);
  };
  const expected = attentionRows(rowValues, rows, shape, ropeFrequencies(rope));
  return [
    float16Comparison(
      "prefill attention",
      await step("prefill", 0, prompt),
      expected.slice(0, prompt).flat(),
    ),
    float16Comparison(
      "decode attention",
      await step("decode", prompt, rows),
      expected.slice(prompt).flat(),
    ),
  ].map((comparison) => ({
    ...comparison,
    tolerance: (i: number) => 1e-3 + 1e-3 * Math.abs(comparison.expected[i]),
  }));
}

/** What each row of a sequence attends to, `(rows)(heads * headDim)`. */
function attentionRows(
  values: Float32Array,
  rows: number,
  { heads, kvHeads, group, headDim }: ReturnType<typeof headShape>,
  frequencies: Float64Array,
): number[][] {
  const head = (row: number, index: number) => {
    const at = (row * (heads + 2 * kvHeads) + index) * headDim;
    return values.subarray(at, at + headDim);
  };
  const past = Array.from({ length: kvHeads }, (_, kv) => ({
    keys: Array.from(
      { length: rows },
      (_, row) => Array.from(ropeReference(head(row, heads + kv), row, frequencies), roundF16),
    ),
    values: Array.from(
      { length: rows },
      (_, row) => Array.from(head(row, heads + kvHeads + kv), roundF16),
    ),
  }));
  return Array.from({ length: rows }, (_, row) =>
    Array.from({ length: heads }, (_, index) => {
      const { keys, values } = past[Math.floor(index / group)];
      const query = ropeReference(head(row, index), row, frequencies);
      return [...attentionReference(query, keys.slice(0, row + 1), values.slice(0, row + 1))];
    }).flat());
}
