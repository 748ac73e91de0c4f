import { assert, assertAlmostEquals, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { FleetError } from "../../shared/errors.ts";
import type { RowRequest, RowResult, SamplingParams } from "../../shared/frames.ts";
import { gaussian, type Random, randomInt, seededRandom } from "../../shared/random.ts";
import { Gpu, type GpuOptions } from "../gpu.ts";
import { sampleReference } from "./reference.ts";
import { createSampler } from "./sampler.ts";

/** Scores closer than this may be decided by rounding. */
const MARGIN = 1e-3;
const LOGPROB_TOLERANCE = 2e-5;

const GREEDY: SamplingParams = {
  temperature: 0,
  topP: 1,
  topK: 0,
  seedLow: 0,
  seedHigh: 0,
  choice: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  biasTokens: new Uint32Array(),
  biasValues: new Float32Array(),
  countTokens: new Uint32Array(),
  counts: new Uint32Array(),
  alternatives: 0,
};

const sample = (row: number, sampling: Partial<SamplingParams>): RowRequest => ({
  type: "sample",
  row,
  sampling: { ...GREEDY, ...sampling },
});

interface Harness {
  answer(rows: Float32Array[], requests: RowRequest[], positions: number[]): Promise<RowResult[]>;
  close(): void;
}

/** A sampler whose logits the test writes; row i of the batch is the row of request i. */
async function openHarness(
  vocab: number,
  maxOutputs: number,
  limits: GpuOptions["limits"] = "adapter",
): Promise<Harness> {
  const gpu = await Gpu.open({ software: true, limits });
  const stride = vocab + 3, offset = 5;
  const logits = gpu.storage("logits", 4 * (offset + stride * maxOutputs));
  const sampler = await createSampler({
    gpu,
    logits: { buffer: logits, stride, offset },
    vocab,
    maxOutputs,
  });
  return {
    async answer(rows, requests, positions) {
      rows.forEach((row, i) =>
        gpu.write(logits, 4 * (offset + i * stride), row as Float32Array<ArrayBuffer>)
      );
      sampler.write(requests, Uint32Array.from(positions));
      const encoder = gpu.device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      const outputs = requests.length;
      sampler.encode(pass, { decodeRows: outputs, rows: outputs, outputs, contextTokens: 1 });
      pass.end();
      gpu.device.queue.submit([encoder.finish()]);
      const parts = [];
      for (const { buffer, offset, bytes } of sampler.ranges(requests)) {
        parts.push(new Uint8Array(await gpu.read(buffer, bytes, offset)));
      }
      const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
      parts.reduce((at, part) => (all.set(part, at), at + part.length), 0);
      return sampler.decode(all, requests);
    },
    close: () => gpu.close(),
  };
}

function randomRow(random: Random, vocab: number, spread = 3): Float32Array {
  return Float32Array.from({ length: vocab }, () => spread * gaussian(random));
}

function randomRequest(random: Random, row: number, vocab: number): RowRequest {
  const kind = randomInt(random, 10);
  if (kind === 0) return { type: "score", row, token: randomInt(random, vocab) };
  if (kind === 1) return { type: "logits", row };
  const tokens = () =>
    Uint32Array.from({ length: randomInt(random, 20) }, () => randomInt(random, vocab));
  const biasTokens = tokens(), countTokens = tokens();
  return sample(row, {
    temperature: [0, 0.5, 1, 1.7][randomInt(random, 4)],
    topP: [1, 0.95, 0.5, 0.01][randomInt(random, 4)],
    topK: [0, 0, 1, 7, 1000][randomInt(random, 5)],
    seedLow: randomInt(random, 2 ** 32),
    seedHigh: randomInt(random, 2 ** 32),
    choice: randomInt(random, 4),
    presencePenalty: random() < 0.5 ? 0 : 4 * random() - 2,
    frequencyPenalty: random() < 0.5 ? 0 : 4 * random() - 2,
    biasTokens,
    biasValues: Float32Array.from(biasTokens, () => 20 * random() - 10),
    countTokens,
    counts: Uint32Array.from(countTokens, () => randomInt(random, 5)),
    alternatives: randomInt(random, Math.min(vocab, 20) + 1),
  });
}

function assertMatchesReference(
  result: RowResult,
  request: RowRequest,
  logits: Float32Array,
  position: number,
): void {
  const expected = sampleReference(logits, request, position);
  const close = (a: number, b: number) =>
    assertAlmostEquals(a, b, LOGPROB_TOLERANCE * (1 + Math.abs(b)));
  assertEquals(result.type, request.type);
  switch (result.type) {
    case "logits":
      return assertEquals(result.logits, logits);
    case "score":
      return close(result.logprob, expected.logprob);
    case "sample": {
      assertEquals([...result.alternativeTokens], expected.alternativeTokens);
      result.alternativeLogprobs.forEach((logprob, i) =>
        close(logprob, expected.alternativeLogprobs[i])
      );
      if (expected.margin < MARGIN || expected.boundary < 1e-5) return;
      assertEquals(result.token, expected.token, JSON.stringify(request));
      return close(result.logprob, expected.logprob);
    }
  }
}

for (const limits of ["adapter", "default"] as const) {
  Deno.test(`Sampler equals its reference on random requests, at ${limits} limits`, async () => {
    const random = seededRandom(3);
    for (const [vocab, rounds] of [[1, 4], [5, 10], [101, 10], [4096, 6], [128256, 1]]) {
      const harness = await openHarness(vocab, 8, limits);
      for (let round = 0; round < rounds; round++) {
        const outputs = 1 + randomInt(random, 8);
        const rows = Array.from({ length: outputs }, () => randomRow(random, vocab));
        const requests = rows.map((_, row) => randomRequest(random, row, vocab));
        const positions = rows.map(() => randomInt(random, 8192));
        const results = await harness.answer(rows, requests, positions);
        results.forEach((result, i) =>
          assertMatchesReference(result, requests[i], rows[i], positions[i])
        );
      }
      harness.close();
    }
  });
}
