/**
 * Sampling against its reference: one row of each way to be asked.
 *
 * @module
 */
import type { RowRequest, SamplingParams } from "../../shared/frames.ts";
import { gaussian, seededRandom } from "../../shared/random.ts";
import { sampleReference } from "../sampling/reference.ts";
import { createSampler } from "../sampling/mod.ts";
import type { Workbench } from "../workbench.ts";
import type { Comparison } from "./check.ts";

/** More than one chunk. */
const VOCAB = 2500;
/** Relative to 1 + the value; a wrong token differs by 1. */
const TOLERANCE = 1e-4;

const GREEDY: SamplingParams = {
  temperature: 0,
  topP: 1,
  topK: 0,
  seedLow: 11,
  seedHigh: 12,
  choice: 0,
  presencePenalty: 0.5,
  frequencyPenalty: 0.25,
  biasTokens: Uint32Array.of(1, 2400),
  biasValues: Float32Array.of(4, -4),
  countTokens: Uint32Array.of(7, 2100),
  counts: Uint32Array.of(1, 3),
  alternatives: 3,
};

/** The rows of the check, in order. */
export const SAMPLING_REQUESTS: RowRequest[] = [
  { type: "sample", row: 0, sampling: GREEDY },
  { type: "sample", row: 1, sampling: { ...GREEDY, temperature: 0.9 } },
  { type: "sample", row: 2, sampling: { ...GREEDY, temperature: 1.2, topP: 0.8 } },
  { type: "sample", row: 3, sampling: { ...GREEDY, temperature: 0.7, topP: 0.95, topK: 40 } },
  { type: "score", row: 4, token: 1234 },
];

/** The logits of the check's rows. */
export function samplingLogits(): Float32Array<ArrayBuffer>[] {
  const random = seededRandom(34);
  return SAMPLING_REQUESTS.map(() =>
    Float32Array.from({ length: VOCAB }, () => 3 * gaussian(random))
  );
}

/** Draws, filters, penalties, scores and alternatives. */
export async function checkSampling(bench: Workbench): Promise<Comparison[]> {
  const { gpu } = bench;
  const outputs = SAMPLING_REQUESTS.length;
  const rows = samplingLogits();
  const buffer = bench.storage("logits", outputs * VOCAB * 4);
  rows.forEach((row, i) => gpu.write(buffer, i * VOCAB * 4, row));
  const logits = { buffer, stride: VOCAB, offset: 0 };
  const sampler = bench.keep(
    await createSampler({ gpu, logits, vocab: VOCAB, maxOutputs: outputs }),
  );
  sampler.write(SAMPLING_REQUESTS, Uint32Array.from(rows.keys()));
  bench.run({ decodeRows: outputs, rows: outputs, outputs, contextTokens: outputs }, sampler);
  const [range] = sampler.ranges(SAMPLING_REQUESTS);
  const raw = await gpu.read(range.buffer, range.bytes, range.offset);
  const actual = sampler.decode(new Uint8Array(raw), SAMPLING_REQUESTS).flatMap((result) => {
    if (result.type !== "sample") return result.type === "score" ? [result.logprob] : [];
    const { token, logprob, alternativeTokens, alternativeLogprobs } = result;
    return [token, logprob, ...alternativeTokens, ...alternativeLogprobs];
  });
  const expected = SAMPLING_REQUESTS.flatMap((request, i) => {
    const result = sampleReference(rows[i], request, i);
    if (request.type === "score") return [result.logprob];
    const { token, logprob, alternativeTokens, alternativeLogprobs } = result;
    return [token, logprob, ...alternativeTokens, ...alternativeLogprobs];
  });
  const tolerance = (i: number) =>
    Number.isInteger(expected[i]) ? 0.5 : TOLERANCE * (1 + Math.abs(expected[i]));
  return [{ kernel: "sampling", actual, expected, tolerance, raw }];
}
