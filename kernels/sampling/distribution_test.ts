import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import type { RowRequest, SamplingParams } from "../../shared/frames.ts";
import { randomInt, seededRandom } from "../../shared/random.ts";
import { distribution } from "./reference.ts";
import { openSampler, randomRow, type SamplerHarness, sampling } from "./testing.ts";

const VOCAB = 4096;
const DRAWS = 20_000;
const DRAWS_PER_STEP = 500;
/** Of the chi-squared statistic as a standard normal: p = 0.001 of failing by chance, once, as all is seeded. */
const MAX_Z = 3.09;

/** Draws many times from one row of logits, at as many positions. */
async function drawMany(
  sampler: SamplerHarness,
  logits: Float32Array<ArrayBuffer>,
  params: SamplingParams,
  draws = DRAWS,
): Promise<Uint32Array> {
  const drawn = new Uint32Array(draws);
  const rows = Array.from({ length: DRAWS_PER_STEP }, () => logits);
  const requests = rows.map((_, row): RowRequest => ({ type: "sample", row, sampling: params }));
  for (let from = 0; from < draws; from += DRAWS_PER_STEP) {
    const results = await sampler.answer(rows, requests, rows.map((_, i) => from + i));
    results.forEach((result, i) => {
      assert(result.type === "sample");
      drawn[from + i] = result.token;
    });
  }
  return drawn;
}

/**
 * How far draws are from a distribution: Pearson's chi-squared over the tokens expected at least five
 * times and one bin for all the others, as a standard normal (Wilson and Hilferty 1931).
 */
function chiSquaredZ(drawn: Uint32Array, expected: Float64Array): number {
  const counts = new Float64Array(expected.length);
  for (const token of drawn) counts[token]++;
  const bins: [count: number, expected: number][] = [];
  const others: [number, number] = [0, 0];
  expected.forEach((probability, token) => {
    const mean = probability * drawn.length;
    if (mean >= 5) {
      bins.push([counts[token], mean]);
    } else {
      others[0] += counts[token];
      others[1] += mean;
    }
  });
  if (others[1] > 0) bins.push(others);
  const chi2 = bins.reduce((sum, [count, mean]) => sum + (count - mean) ** 2 / mean, 0);
  const spread = 2 / (9 * (bins.length - 1));
  return (Math.cbrt(chi2 / (bins.length - 1)) - (1 - spread)) / Math.sqrt(spread);
}

Deno.test("20,000 draws with bias, penalties, temperature and top_p match the distribution", async () => {
  const random = seededRandom(21);
  const sampler = await openSampler(VOCAB, DRAWS_PER_STEP);
  const tokens = (count: number) =>
    Uint32Array.from(new Set(Array.from({ length: count }, () => randomInt(random, VOCAB))));
  const logits = randomRow(random, VOCAB, 1.5);
  const biasTokens = tokens(100);
  // Penalties fall on what would otherwise be drawn most.
  const countTokens = Uint32Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a])
    .subarray(0, 60);
  const params = sampling({
    temperature: 0.8,
    topP: 0.9,
    seedLow: 1,
    seedHigh: 2,
    presencePenalty: 0.7,
    frequencyPenalty: 0.3,
    biasTokens,
    biasValues: Float32Array.from(biasTokens, () => 6 * random() - 2),
    countTokens,
    counts: Uint32Array.from(countTokens, () => 1 + randomInt(random, 4)),
  });
  const drawn = await drawMany(sampler, logits, params);
  const expected = distribution(logits, params);
  assertEquals(drawn.filter((token) => expected[token] === 0), new Uint32Array());
  assertLess(Math.abs(chiSquaredZ(drawn, expected)), MAX_Z);
  // The same measure tells these draws from every distribution that leaves one of the parts out.
  for (
    const wrong of [
      { temperature: 1 },
      { topP: 0.99 },
      { biasTokens: new Uint32Array() },
      { presencePenalty: 0 },
      { frequencyPenalty: 0 },
    ]
  ) {
    const z = chiSquaredZ(drawn, distribution(logits, { ...params, ...wrong }));
    assertGreater(z, 2 * MAX_Z, JSON.stringify(wrong));
  }
  sampler.close();
});

Deno.test("Draws from all of a vocabulary, and with top_k, match the distribution", async () => {
  const random = seededRandom(22);
  const vocab = 1000, sampler = await openSampler(vocab, DRAWS_PER_STEP);
  const logits = randomRow(random, vocab, 2);
  for (const [topK, draws] of [[0, 10_000], [40, 4_000]]) {
    const params = sampling({ temperature: 1, topK, seedLow: 3 });
    const drawn = await drawMany(sampler, logits, params, draws);
    assertLess(Math.abs(chiSquaredZ(drawn, distribution(logits, params))), MAX_Z);
  }
  sampler.close();
});

Deno.test("Draws of other seeds, choices and positions look independent", async () => {
  const random = seededRandom(23), vocab = 64, count = 1024;
  const sampler = await openSampler(vocab, count);
  const logits = new Float32Array(vocab);
  const draw = async (key: Partial<SamplingParams>, firstPosition: number) => {
    const params = sampling({ temperature: 1, ...key });
    const rows = Array.from({ length: count }, () => logits);
    const results = await sampler.answer(
      rows,
      rows.map((_, row) => ({ type: "sample", row, sampling: params })),
      rows.map((_, i) => firstPosition + i),
    );
    return results.map((result) => result.type === "sample" ? result.token : -1);
  };
  const base = { seedLow: randomInt(random, 2 ** 32), seedHigh: 9, choice: 0 };
  const streams = [
    await draw(base, 0),
    await draw({ ...base, seedLow: base.seedLow ^ 1 }, 0),
    await draw({ ...base, seedHigh: 8 }, 0),
    await draw({ ...base, choice: 1 }, 0),
    await draw(base, 1),
  ];
  const pairs = streams.flatMap((a, i) => streams.slice(i + 1).map((b) => [a, b]));
  for (const [a, b] of pairs) {
    // Uniform and independent: equal at 1 place in 64, so 16 of 1024, with a deviation of 4.
    const equal = a.filter((token, i) => token === b[i]).length;
    assertLess(Math.abs(equal - count / vocab), 4 * 4);
  }
  assertEquals(streams[4].slice(0, -1), streams[0].slice(1), "the same key draws the same token");
  assertEquals(await draw(base, 0), streams[0]);
  sampler.close();
});
