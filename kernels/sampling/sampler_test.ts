import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertRejects,
} from "@std/assert";
import { FleetError } from "../../shared/errors.ts";
import type { RowRequest, RowResult } from "../../shared/frames.ts";
import { LIMITS } from "../../shared/limits.ts";
import { type Random, randomInt, seededRandom } from "../../shared/random.ts";
import { gumbel, sampleReference } from "./reference.ts";
import { openSampler, randomRow, sampleRequest, sampling } from "./testing.ts";

/** Scores closer than this, and masses closer to top_p, may be decided by rounding. */
const SCORE_MARGIN = 1e-3;
const MASS_MARGIN = 1e-5;
const LOGPROB_TOLERANCE = 2e-5;

function randomRequest(random: Random, row: number, vocab: number): RowRequest {
  const kind = randomInt(random, 10);
  if (kind === 0) return { type: "score", row, token: randomInt(random, vocab) };
  if (kind === 1) return { type: "logits", row };
  const tokens = () =>
    Uint32Array.from({ length: randomInt(random, 20) }, () => randomInt(random, vocab));
  const biasTokens = tokens(), countTokens = tokens();
  return sampleRequest(row, {
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

/** Checks one answer; false when rounding may have decided the draw. */
function matchesReference(
  result: RowResult,
  request: RowRequest,
  logits: Float32Array,
  position: number,
): boolean {
  const expected = sampleReference(logits, request, position);
  const close = (a: number, b: number) =>
    assertAlmostEquals(a, b, LOGPROB_TOLERANCE * (1 + Math.abs(b)));
  assertEquals(result.type, request.type);
  switch (result.type) {
    case "logits":
      assertEquals(result.logits, logits);
      return true;
    case "score":
      close(result.logprob, expected.logprob);
      return true;
    case "sample":
      assertEquals([...result.alternativeTokens], expected.alternativeTokens);
      result.alternativeLogprobs.forEach((logprob, i) =>
        close(logprob, expected.alternativeLogprobs[i])
      );
      if (expected.margin < SCORE_MARGIN || expected.boundary < MASS_MARGIN) return false;
      assertEquals(result.token, expected.token, JSON.stringify(request));
      close(result.logprob, expected.logprob);
      return true;
  }
}

for (const limits of ["adapter", "default"] as const) {
  Deno.test(`Sampler equals its reference on random requests, at ${limits} limits`, async () => {
    const random = seededRandom(3);
    let checked = 0, asked = 0;
    for (const [vocab, rounds] of [[1, 3], [5, 8], [101, 8], [4096, 6], [128256, 1]]) {
      const sampler = await openSampler(vocab, 8, limits);
      for (let round = 0; round < rounds; round++) {
        const outputs = 1 + randomInt(random, 8);
        const rows = Array.from({ length: outputs }, () => randomRow(random, vocab));
        const requests = rows.map((_, row) => randomRequest(random, row, vocab));
        const positions = rows.map(() => randomInt(random, 8192));
        const results = await sampler.answer(rows, requests, positions);
        asked += outputs;
        checked += results
          .filter((result, i) => matchesReference(result, requests[i], rows[i], positions[i]))
          .length;
      }
      sampler.close();
    }
    assertGreater(checked, 0.9 * asked, "nearly all draws were decided by more than rounding");
  });
}

Deno.test("A row is answered with the same bits alone, in company, and at another place", async () => {
  const vocab = 5000, random = seededRandom(4);
  const sampler = await openSampler(vocab, 8);
  const rows = Array.from({ length: 8 }, () => randomRow(random, vocab));
  const requests = rows.map((_, row) => randomRequest(random, row, vocab));
  const positions = rows.map(() => randomInt(random, 8192));
  const together = await sampler.answer(rows, requests, positions);
  for (let i = 0; i < rows.length; i++) {
    const alone = await sampler.answer([rows[i]], [{ ...requests[i], row: 0 }], [positions[i]]);
    assertEquals({ ...alone[0], row: i }, together[i]);
  }
  const order = [3, 7, 0, 5, 1];
  const moved = await sampler.answer(
    order.map((i) => rows[i]),
    order.map((i, row) => ({ ...requests[i], row })),
    order.map((i) => positions[i]),
  );
  moved.forEach((result, at) => assertEquals({ ...result, row: order[at] }, together[order[at]]));
  sampler.close();
});

Deno.test("Of equal logits the lowest token is greedy's, zeros of both signs being equal", async () => {
  const sampler = await openSampler(6000, 1);
  const row = new Float32Array(6000).fill(-1);
  row[5999] = row[3000] = 0;
  row[2999] = -0;
  const [result] = await sampler.answer([row], [sampleRequest(0, { alternatives: 4 })], [0]);
  assert(result.type === "sample");
  assertEquals(result.token, 2999);
  assertEquals([...result.alternativeTokens], [2999, 3000, 5999, 0]);
  sampler.close();
});

Deno.test("top_k keeps all equals of its last token, and nothing else", async () => {
  const sampler = await openSampler(64, 256);
  const row = new Float32Array(64).fill(0);
  row[9] = 0.5;
  for (const token of [3, 20, 41]) row[token] = 0.25;
  const rows = Array.from({ length: 256 }, () => row);
  const requests = rows.map((_, i) => sampleRequest(i, { temperature: 1, topK: 2 }));
  const results = await sampler.answer(rows, requests, rows.map((_, i) => i));
  const drawn = new Set(results.map((result) => result.type === "sample" && result.token));
  assertEquals([...drawn].sort((a, b) => Number(a) - Number(b)), [3, 9, 20, 41]);
  sampler.close();
});

Deno.test("A token in both bias and counts gets one summed addition", async () => {
  const sampler = await openSampler(10, 1);
  const row = new Float32Array(10);
  const request = sampleRequest(0, {
    biasTokens: Uint32Array.of(4, 6),
    biasValues: Float32Array.of(3, 2.5),
    countTokens: Uint32Array.of(4, 1),
    counts: Uint32Array.of(2, 0),
    presencePenalty: 0.5,
    frequencyPenalty: 0.25,
    alternatives: 3,
  });
  const [result] = await sampler.answer([row], [request], [0]);
  assert(result.type === "sample");
  // 4: 3 - 0.5 - 2 * 0.25 = 2, below 6's 2.5; a count of 0 takes nothing from 1.
  assertEquals([...result.alternativeTokens], [6, 4, 0]);
  assertAlmostEquals(result.alternativeLogprobs[0] - result.alternativeLogprobs[1], 0.5, 1e-6);
  sampler.close();
});

// Seed 7 gives token 67 at position 86148 the 32 bits 34: a uniform that 24 bits could not hold.
Deno.test("A token of probability 4e-8 is drawn when its noise says so", async () => {
  const params = { temperature: 1, seedLow: 7 };
  const position = 86147, token = 67, rival = 12;
  const noise = gumbel(sampling(params), position + 1, token);
  const rivals = gumbel(sampling(params), position + 1, rival);
  assertAlmostEquals(noise, -Math.log((34 + 2915093898 / 2 ** 32) / 2 ** 32), 1e-6);
  const sampler = await openSampler(100, 1);
  for (const [gap, drawn] of [[0.0026, token], [-0.0026, rival]]) {
    const row = new Float32Array(100).fill(-60);
    row[rival] = 0;
    row[token] = rivals - noise + gap;
    assert(row[token] < -16.5, "far down the tail");
    const [result] = await sampler.answer([row], [sampleRequest(0, params)], [position]);
    assert(result.type === "sample");
    assertEquals(result.token, drawn);
  }
  sampler.close();
});

Deno.test("A logit that is not finite is an error that names the row, whatever was asked", async () => {
  const sampler = await openSampler(3000, 2);
  const asked: RowRequest[] = [
    sampleRequest(7, {}),
    sampleRequest(7, { temperature: 1, topP: 0.5, topK: 4, alternatives: 20 }),
    { type: "score", row: 7, token: 1 },
    { type: "logits", row: 7 },
  ];
  const fine = new Float32Array(3000);
  for (const value of [NaN, Infinity, -Infinity]) {
    const broken = new Float32Array(3000);
    broken[2500] = value;
    for (const request of asked) {
      await assertRejects(
        () => sampler.answer([fine, broken], [sampleRequest(6, {}), request], Array(8).fill(0)),
        FleetError,
        "The logits of row 7 are not finite",
      );
    }
  }
  const [result] = await sampler.answer([fine], [asked[1]], Array(8).fill(0));
  assertEquals(result.type, "sample", "a later step is not harmed");
  sampler.close();
});

Deno.test("Sampler refuses tokens beyond the vocabulary and more adjustments than a step may have", async () => {
  const vocab = 9000, sampler = await openSampler(vocab, 20);
  const row = new Float32Array(vocab);
  const beyond = sampleRequest(0, {
    biasTokens: Uint32Array.of(vocab),
    biasValues: Float32Array.of(1),
  });
  for (const request of [beyond, { type: "score", row: 0, token: vocab } as const]) {
    await assertRejects(() => sampler.answer([row], [request], [0]), FleetError, "vocabulary");
  }
  const countTokens = Uint32Array.from({ length: LIMITS.maxCountEntries }, (_, i) => i);
  const counts = new Uint32Array(countTokens.length).fill(1);
  const rows = Array.from({ length: 17 }, () => row);
  const many = rows.map((_, i) => sampleRequest(i, { countTokens, counts, presencePenalty: 1 }));
  const positions = rows.map(() => 0);
  await assertRejects(() => sampler.answer(rows, many, positions), FleetError, "fewer rows");
  await sampler.answer(rows.slice(1), many.slice(0, 16), positions);
  sampler.close();
});
