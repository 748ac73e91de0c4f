import { assert, assertEquals, assertLessOrEqual, assertThrows } from "@std/assert";
import { decodeFrame, encodeFrame, resultFrameBytes, stepFrameBytes } from "./codec.ts";
import { FleetError } from "./errors.ts";
import type {
  Frame,
  FrameOrder,
  ResultFrame,
  RowRequest,
  RowResult,
  SamplingParams,
  StageTrace,
  StepFrame,
} from "./frames.ts";
import { LIMITS } from "./limits.ts";
import { type Random, randomInt, seededRandom } from "./random.ts";

const u32 = (random: Random) => randomInt(random, 2 ** 32);

function randomTokens(random: Random, length: number): Uint32Array {
  return Uint32Array.from(
    { length },
    (_, i) => i * 7 + randomInt(random, 7),
  );
}

function randomSampling(random: Random): SamplingParams {
  const biases = randomInt(random, 4), counted = randomInt(random, 5);
  return {
    temperature: random() < 0.3 ? 0 : random() * 2,
    topP: 1 - random(),
    topK: randomInt(random, 100),
    seedLow: u32(random),
    seedHigh: u32(random),
    choice: randomInt(random, 16),
    presencePenalty: random() * 4 - 2,
    frequencyPenalty: random() * 4 - 2,
    biasTokens: randomTokens(random, biases),
    biasValues: Float32Array.from({ length: biases }, () => random() * 200 - 100),
    countTokens: randomTokens(random, counted),
    counts: Uint32Array.from({ length: counted }, () => 1 + randomInt(random, 9)),
    alternatives: randomInt(random, 21),
  };
}

function randomOrder(random: Random): FrameOrder & { issuedAtMs: number; traces: StageTrace[] } {
  const attemptBase = 1 + randomInt(random, 1000);
  return {
    epoch: u32(random),
    attempt: 1 + randomInt(random, 9),
    attemptBase,
    step: attemptBase + randomInt(random, 100),
    issuedAtMs: 1.7e12 + random() * 1e9,
    traces: Array.from({ length: randomInt(random, 4) }, () => ({
      receivedAtMs: 1.7e12 + random(),
      startedAtMs: 1.7e12 + random(),
      gpuMs: random(),
      readbackMs: random(),
      sentAtMs: 1.7e12 + random(),
    })),
  };
}

function randomStep(random: Random): StepFrame {
  const sequences = 1 + randomInt(random, 5);
  const rows: { sequence: number; position: number; decode: boolean }[] = [];
  const pages: Uint32Array[] = [];
  for (let sequence = 0; sequence < sequences; sequence++) {
    const start = randomInt(random, 100);
    const prefill = randomInt(random, 6), decode = prefill ? randomInt(random, 3) : 1;
    for (let i = 0; i < prefill + decode; i++) {
      rows.push({ sequence, position: start + i, decode: i >= prefill });
    }
    pages.push(
      Uint32Array.from(
        { length: Math.ceil((start + prefill + decode) / LIMITS.pageTokens) },
        () => u32(random),
      ),
    );
  }
  const ordered = [...rows.filter((row) => row.decode), ...rows.filter((row) => !row.decode)];
  const requests: RowRequest[] = [];
  for (let row = 0; row < ordered.length; row++) {
    const draw = random();
    if (draw < 0.4) requests.push({ type: "sample", row, sampling: randomSampling(random) });
    else if (draw < 0.5) requests.push({ type: "score", row, token: u32(random) });
    else if (draw < 0.6) requests.push({ type: "logits", row });
  }
  const hidden = random() < 0.5
    ? Uint16Array.from({ length: ordered.length * 6 }, () => randomInt(random, 65536))
    : null;
  return {
    type: "step",
    ...randomOrder(random),
    batch: {
      sequences: pages.map((pages) => ({ pages })),
      rowSequence: Uint16Array.from(ordered, (row) => row.sequence),
      rowPosition: Uint32Array.from(ordered, (row) => row.position),
      rowToken: Uint32Array.from(ordered, () => u32(random)),
      decodeRows: rows.filter((row) => row.decode).length,
      requests,
    },
    hidden,
  };
}

function randomResult(random: Random): ResultFrame {
  const results: RowResult[] = [];
  for (let row = 0; row < 12; row++) {
    const draw = random();
    const entries = randomInt(random, 21);
    if (draw < 0.4) {
      results.push({
        type: "sample",
        row,
        token: u32(random),
        logprob: -random() * 20,
        alternativeTokens: Uint32Array.from({ length: entries }, () => u32(random)),
        alternativeLogprobs: Float32Array.from({ length: entries }, () => -random() * 20),
      });
    } else if (draw < 0.5) results.push({ type: "score", row, logprob: -random() });
    else if (draw < 0.6) {
      results.push({
        type: "logits",
        row,
        logits: Float32Array.from({ length: 50 }, () => random() * 20 - 10),
      });
    }
  }
  return { type: "result", ...randomOrder(random), results };
}

const randomFrame = (random: Random): Frame =>
  random() < 0.7 ? randomStep(random) : randomResult(random);

/** A small step by hand, for tests that break one thing. */
function tinyStep(): StepFrame {
  return {
    type: "step",
    epoch: 3,
    attempt: 2,
    attemptBase: 4,
    step: 5,
    issuedAtMs: 1.5,
    batch: {
      sequences: [{ pages: Uint32Array.of(9) }, { pages: Uint32Array.of(7, 8) }],
      rowSequence: Uint16Array.of(0, 1, 1),
      rowPosition: Uint32Array.of(3, 40, 41),
      rowToken: Uint32Array.of(100, 200, 300),
      decodeRows: 1,
      requests: [{
        type: "sample",
        row: 0,
        sampling: {
          temperature: 0.5,
          topP: 1,
          topK: 0,
          seedLow: 1,
          seedHigh: 2,
          choice: 0,
          presencePenalty: 0,
          frequencyPenalty: 0,
          biasTokens: Uint32Array.of(11, 12),
          biasValues: Float32Array.of(1, -1),
          countTokens: Uint32Array.of(13),
          counts: Uint32Array.of(2),
          alternatives: 1,
        },
      }, { type: "score", row: 2, token: 17 }],
    },
    hidden: Uint16Array.of(1, 2, 3, 4, 5, 6),
    traces: [{ receivedAtMs: 1, startedAtMs: 2, gpuMs: 3, readbackMs: 4, sentAtMs: 5 }],
  };
}

Deno.test("every frame decodes to what was encoded, aligned or not", () => {
  const random = seededRandom(1);
  for (let i = 0; i < 400; i++) {
    const frame = randomFrame(random);
    const bytes = encodeFrame(frame);
    assertEquals<Frame>(decodeFrame(bytes), frame);
    const shifted = new Uint8Array(bytes.length + 1);
    shifted.set(bytes, 1);
    assertEquals<Frame>(decodeFrame(shifted.subarray(1)), frame);
  }
});

Deno.test("decoding copies nothing: the arrays are views of the frame's buffer", () => {
  const bytes = encodeFrame(tinyStep());
  const frame = decodeFrame(bytes) as StepFrame;
  assert(frame.hidden?.buffer === bytes.buffer);
  assert(frame.batch.rowPosition.buffer === bytes.buffer);
  assert(frame.batch.sequences[1].pages.buffer === bytes.buffer);
});

Deno.test("the layout of version 1 stays as it is, to the byte", () => {
  const hex = (frame: Frame) => encodeFrame(frame).toHex();
  assertEquals(hex(tinyStep()), GOLDEN_STEP);
  assertEquals(hex(tinyResult()), GOLDEN_RESULT);
});

function tinyResult(): ResultFrame {
  return {
    type: "result",
    epoch: 3,
    attempt: 2,
    attemptBase: 4,
    step: 5,
    issuedAtMs: 1.5,
    results: [
      {
        type: "sample",
        row: 0,
        token: 42,
        logprob: -0.5,
        alternativeTokens: Uint32Array.of(42),
        alternativeLogprobs: Float32Array.of(-0.5),
      },
      { type: "score", row: 1, logprob: -2 },
      { type: "logits", row: 2, logits: Float32Array.of(1, 2) },
    ],
    traces: [],
  };
}

Deno.test("stepFrameBytes() is the exact size on the way to the last stage", () => {
  const random = seededRandom(2);
  for (let i = 0; i < 100; i++) {
    const frame = randomStep(random);
    const { batch } = frame;
    const stages = 1 + randomInt(random, 5), hiddenSize = 8 * randomInt(random, 9) + 8;
    const rows = batch.rowToken.length;
    frame.traces = Array.from({ length: stages - 1 }, () => tinyStep().traces[0]);
    frame.hidden = stages > 1 ? new Uint16Array(rows * hiddenSize) : null;
    const samplings = batch.requests.flatMap((r) => r.type === "sample" ? [r.sampling] : []);
    const total = (of: (params: SamplingParams) => number) =>
      samplings.reduce((sum, params) => sum + of(params), 0);
    assertEquals(
      stepFrameBytes({
        rows,
        sequences: batch.sequences.length,
        pageEntries: batch.sequences.reduce((sum, { pages }) => sum + pages.length, 0),
        requests: batch.requests.length,
        biasEntries: total((params) => params.biasTokens.length),
        countEntries: total((params) => params.countTokens.length),
        hiddenSize,
        stages,
      }),
      encodeFrame(frame).byteLength,
    );
  }
});

Deno.test("resultFrameBytes() is the exact size of a result", () => {
  const frame = tinyResult();
  frame.traces = [tinyStep().traces[0], tinyStep().traces[0]];
  assertEquals(
    resultFrameBytes({ results: 3, alternatives: 1, logits: 2, stages: 2 }),
    encodeFrame(frame).byteLength,
  );
});

Deno.test("a frame that would not fit the wire is refused when it is made", () => {
  const frame = tinyStep();
  frame.hidden = new Uint16Array(3 * 200_000);
  assertEquals(assertThrows(() => encodeFrame(frame), FleetError).code, "too-large");
});

/** Bytes either decode to a frame that encodes to the same bytes, or are refused as `bad-frame`. */
function decodesOrRefuses(bytes: Uint8Array): boolean {
  let frame: Frame;
  try {
    frame = decodeFrame(bytes);
  } catch (error) {
    assert(error instanceof FleetError && error.code === "bad-frame", String(error));
    return false;
  }
  assertEquals(encodeFrame(frame), new Uint8Array(bytes));
  return true;
}

Deno.test("every truncation and every extension of a frame is refused", () => {
  for (const frame of [tinyStep(), tinyResult()]) {
    const bytes = encodeFrame(frame);
    for (let length = 0; length < bytes.length; length++) {
      assert(!decodesOrRefuses(bytes.subarray(0, length)), `${length} bytes decoded`);
    }
    const longer = new Uint8Array(bytes.length + 8);
    longer.set(bytes);
    for (let more = 1; more <= 8; more++) {
      assert(!decodesOrRefuses(longer.subarray(0, bytes.length + more)));
    }
  }
});

Deno.test("every corruption of one byte, and random ones of many, decode cleanly or are refused", () => {
  const random = seededRandom(3);
  for (const frame of [tinyStep(), tinyResult(), randomStep(random), randomResult(random)]) {
    const bytes = encodeFrame(frame);
    for (let at = 0; at < bytes.length; at++) {
      for (const flip of [1, 0x80, 0xff, 1 + randomInt(random, 255)]) {
        const broken = bytes.slice();
        broken[at] ^= flip;
        decodesOrRefuses(broken);
      }
    }
    for (let i = 0; i < 500; i++) {
      const broken = bytes.slice();
      for (let n = 0; n < 4; n++) broken[randomInt(random, broken.length)] = randomInt(random, 256);
      decodesOrRefuses(broken);
    }
  }
});

Deno.test("lying counts are refused before anything is allocated by them", () => {
  const bytes = encodeFrame(tinyStep());
  for (let word = 8; word < 18; word++) {
    for (const value of [0xffffffff, 0x7fffffff, 0x10000]) {
      const lying = bytes.slice();
      new DataView(lying.buffer).setUint32(4 * word, value, true);
      assert(!decodesOrRefuses(lying), `word ${word} = ${value} decoded`);
    }
  }
});

const REFUSALS: [name: string, reason: string, change: (frame: StepFrame) => void][] = [
  ["a time of issue that is NaN", "time of issue", (f) => f.issuedAtMs = NaN],
  ["attempt 0", "attempts start", (f) => f.attempt = 0],
  ["a step before its attempt's base", "comes before", (f) => f.attemptBase = 6],
  ["more decode rows than rows", "decode rows", (f) => f.batch.decodeRows = 4],
  ["a row of no sequence", "not there", (f) => f.batch.rowSequence[0] = 2],
  ["a position without a page", "no page holds", (f) => f.batch.rowPosition[0] = 32],
  ["falling positions", "do not rise", (f) => f.batch.rowPosition[2] = 39],
  ["equal positions", "do not rise", (f) => f.batch.rowPosition[2] = 40],
  ["a sequence torn apart", "stand together", (f) => {
    f.batch.decodeRows = 0;
    f.batch.rowSequence = Uint16Array.of(1, 0, 1);
    f.batch.rowPosition = Uint32Array.of(40, 3, 41);
  }],
  ["prefill after decode of one sequence", "before the decode rows", (f) => {
    f.batch.decodeRows = 2;
  }],
  ["two requests of a row", "rising order", (f) => f.batch.requests[1].row = 0],
  ["unsorted requests", "rising order", (f) => f.batch.requests.reverse()],
  ["a request for no row", "row 3 of 3", (f) => f.batch.requests[1].row = 3],
  ["a NaN temperature", "not finite", (f) => sampling(f).temperature = NaN],
  ["a negative temperature", "negative", (f) => sampling(f).temperature = -1],
  ["an infinite penalty", "not finite", (f) => sampling(f).presencePenalty = Infinity],
  ["top_p 0", "top_p", (f) => sampling(f).topP = 0],
  ["top_p above 1", "top_p", (f) => sampling(f).topP = 1.1],
  ["21 alternatives", "alternatives", (f) => sampling(f).alternatives = 21],
  ["a NaN bias", "without a value", (f) => sampling(f).biasValues[0] = NaN],
  ["a token biased twice", "twice", (f) => sampling(f).biasTokens[1] = 11],
  ["a NaN trace", "trace", (f) => f.traces[0].gpuMs = NaN],
  ["no rows", "0 rows", (f) => {
    f.batch.rowSequence = new Uint16Array();
    f.batch.rowPosition = f.batch.rowToken = new Uint32Array();
    f.hidden = null;
  }],
];

function sampling(frame: StepFrame): SamplingParams {
  const request = frame.batch.requests[0];
  assert(request.type === "sample");
  return request.sampling;
}

for (const [name, reason, change] of REFUSALS) {
  Deno.test(`decodeFrame() refuses ${name}`, () => {
    const frame = tinyStep();
    decodeFrame(encodeFrame(frame));
    change(frame);
    const bytes = encodeFrame(frame);
    assertEquals(assertThrows(() => decodeFrame(bytes), FleetError, reason).code, "bad-frame");
  });
}

Deno.test("decodeFrame() refuses more rows, sequences and requests than a step may have", () => {
  const sized = (rows: number, sequences: number, requests: number) => {
    const frame = tinyStep();
    frame.hidden = null;
    frame.batch = {
      sequences: Array.from({ length: sequences }, () => ({ pages: new Uint32Array(10) })),
      rowSequence: new Uint16Array(rows),
      rowPosition: Uint32Array.from({ length: rows }, (_, i) => i),
      rowToken: new Uint32Array(rows),
      decodeRows: 0,
      requests: Array.from({ length: requests }, (_, row) => ({ type: "logits", row })),
    };
    return encodeFrame(frame);
  };
  const { maxRowsPerStep, maxSequencesPerStep, maxOutputsPerStep } = LIMITS;
  decodeFrame(sized(maxRowsPerStep, maxSequencesPerStep, maxOutputsPerStep));
  assertThrows(() => decodeFrame(sized(maxRowsPerStep + 1, 1, 0)), FleetError, "257 rows");
  assertThrows(() => decodeFrame(sized(1, maxSequencesPerStep + 1, 0)), FleetError, "65 sequences");
  assertThrows(() => decodeFrame(sized(99, 1, maxOutputsPerStep + 1)), FleetError, "65 requests");
});

Deno.test("decodeFrame() refuses a frame above the bound without reading it", () => {
  const huge = new Uint8Array(LIMITS.maxFrameBytes + 1);
  assertThrows(() => decodeFrame(huge), FleetError, "at most");
  assertLessOrEqual(encodeFrame(tinyStep()).byteLength, LIMITS.maxFrameBytes);
});

Deno.test("decodeFrame() refuses results without a probability", () => {
  const frame = tinyResult();
  const [first] = frame.results;
  assert(first.type === "sample");
  first.logprob = NaN;
  assertThrows(() => decodeFrame(encodeFrame(frame)), FleetError, "not a number");
  first.logprob = -1;
  first.alternativeLogprobs[0] = NaN;
  assertThrows(() => decodeFrame(encodeFrame(frame)), FleetError, "no log-probability");
});

const GOLDEN_STEP = [
  // header
  "4347464d0100010003000000020000000400000005000000000000000000f83f0100000003000000",
  "0100000002000000030000000200000002000000010000000200000000000000",
  // traces
  "000000000000f03f0000000000000040000000000000084000000000000010400000000000001440",
  // sampling
  "000000000000e03f000000000000f03f000000000000000000000000000000000000000000000000",
  "000000000000000000000000000000000000000000000000",
  // requests
  "01000000000000000000000000000000010000000200000000000000010000000200000001000000",
  "02000000020000001100000000000000000000000000000000000000000000000000000000000000",
  // pages per sequence
  "0100000002000000",
  // pages
  "090000000700000008000000",
  // positions
  "030000002800000029000000",
  // tokens
  "64000000c80000002c010000",
  // bias
  "0b0000000c0000000000803f000080bf",
  // counts
  "0d00000002000000",
  // hidden
  "010002000300040005000600",
  // row sequences
  "000001000100",
].join("");

const GOLDEN_RESULT = [
  // header
  "4347464d0100020003000000020000000400000005000000000000000000f83f0000000003000000",
  "0100000002000000000000000000000000000000000000000000000000000000",
  // log-probabilities
  "000000000000e0bf00000000000000c00000000000000000",
  // results
  "01000000000000002a00000001000000020000000100000000000000000000000300000002000000",
  "0000000002000000",
  // alternatives
  "2a000000000000bf",
  // logits
  "0000803f00000040",
].join("");
