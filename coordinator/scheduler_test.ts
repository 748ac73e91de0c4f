import { assert, assertEquals, assertLessOrEqual, assertThrows } from "@std/assert";
import { stepFrameBytes } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import type { RowResult } from "../shared/frames.ts";
import { PLAIN_REQUEST } from "./engine.ts";
import {
  type ScheduledStep,
  Scheduler,
  type SchedulerConfig,
  type SchedulerEvent,
  type SubmittedSequence,
} from "./scheduler.ts";

function scheduler(changes: Partial<SchedulerConfig> = {}): Scheduler {
  return new Scheduler(config(changes));
}

function config(changes: Partial<SchedulerConfig> = {}): SchedulerConfig {
  return {
    stages: 1,
    maxStepsInFlight: 2,
    maxRows: 64,
    maxSequencesPerStep: 16,
    maxOutputs: 16,
    prefillRowsPerStep: 32,
    pages: 64,
    contextTokens: 512,
    maxQueuedSequences: 32,
    maxFrameBytes: 1e6,
    frameBytes: (shape) => stepFrameBytes({ ...shape, hiddenSize: 8, stages: 1 }),
    ...changes,
  };
}

function sequence(
  id: string,
  promptLength: number,
  changes: Partial<SubmittedSequence> = {},
): SubmittedSequence {
  return {
    ...PLAIN_REQUEST,
    id,
    promptTokens: Uint32Array.from({ length: promptLength }, (_, i) => 100 + i),
    maxTokens: 1000,
    seed: 0x0123456789abcdefn,
    ...changes,
  };
}

function answer(step: ScheduledStep, token = 7): RowResult[] {
  return step.batch.requests.map(({ row }) => ({
    type: "sample",
    row,
    token,
    logprob: -1,
    alternativeTokens: Uint32Array.of(token),
    alternativeLogprobs: Float32Array.of(-1),
  }));
}

/** Sends the next step and answers it at once. */
function advance(s: Scheduler, token = 7): { step: ScheduledStep; events: SchedulerEvent[] } {
  const step = s.nextStep();
  assert(step, "there is a step");
  return { step, events: s.complete(step.step, answer(step, token)) };
}

/** Rows of each sequence of a step. */
function rows(step: ScheduledStep): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const index of step.batch.rowSequence) {
    const id = step.sequences[index];
    counts[id] = (counts[id] ?? 0) + 1;
  }
  return counts;
}

Deno.test("a prompt is prefilled in chunks, its last row samples, then decode rows follow", () => {
  const s = scheduler();
  s.submit(sequence("a", 40));
  const first = advance(s);
  assertEquals(first.step.batch.rowToken.length, 32);
  assertEquals([first.step.batch.decodeRows, first.step.batch.requests.length], [0, 0]);
  const second = advance(s);
  assertEquals(second.step.batch.rowPosition, Uint32Array.of(32, 33, 34, 35, 36, 37, 38, 39));
  assertEquals(second.step.batch.requests.map(({ row }) => row), [7]);
  assertEquals(second.step.batch.sequences[0].pages.length, 2);
  assertEquals(second.events, [
    { id: "a", type: "token", token: 7, logprob: -1, alternatives: [{ token: 7, logprob: -1 }] },
  ]);
  const { batch } = advance(s).step;
  assertEquals([batch.decodeRows, batch.rowToken[0], batch.rowPosition[0]], [1, 7, 40]);
  assertEquals(batch.requests.length, 1);
});

Deno.test("a step mixes decode rows, which come first, with prefill rows of others", () => {
  const s = scheduler();
  s.submit(sequence("a", 5));
  advance(s);
  s.submit(sequence("b", 10));
  const { batch, sequences } = advance(s).step;
  assertEquals(sequences, ["a", "b"]);
  assertEquals([batch.decodeRows, batch.rowToken.length], [1, 11]);
  assertEquals(batch.requests.map(({ row }) => row), [0, 10]);
});

Deno.test("a sequence is in one step at a time, and steps in flight are bounded", () => {
  const s = scheduler();
  for (const id of ["a", "b", "c", "d"]) s.submit(sequence(id, 3));
  const one = s.nextStep()!, two = s.nextStep()!;
  assertEquals([...one.sequences, ...two.sequences].sort(), ["a", "b", "c", "d"]);
  assertEquals(one.sequences.length, 2);
  assertEquals(s.nextStep(), null);
  assertEquals(s.stats.stepsInFlight, 2);
});

Deno.test("a stop token is reported, then the end; a limit of tokens ends with length", () => {
  const s = scheduler();
  s.submit(sequence("a", 3, { stopTokens: [9] }));
  assertEquals(advance(s, 9).events.map((event) => event.type), ["token", "finish"]);
  s.submit(sequence("b", 3, { maxTokens: 2 }));
  advance(s);
  assertEquals(advance(s).events.at(-1), { id: "b", type: "finish", reason: "length" });
  assertEquals(s.stats.pagesUsed, 0);
});

Deno.test("the context ends a sequence, be it the model's or what all pages hold", () => {
  for (const changes of [{ contextTokens: 32 }, { pages: 1 }]) {
    const s = scheduler(changes);
    s.submit(sequence("a", 30));
    advance(s);
    assertEquals(advance(s).events.at(-1), { id: "a", type: "finish", reason: "length" });
    const error = assertThrows(() => s.submit(sequence("b", 32)), FleetError);
    assertEquals(error.code, "too-large");
  }
});

Deno.test("submit() refuses when the queue is full, and takes more when a place is free", () => {
  const s = scheduler({ maxQueuedSequences: 1 });
  s.submit(sequence("a", 3));
  assertEquals(assertThrows(() => s.submit(sequence("b", 3)), FleetError).code, "overloaded");
  s.cancel("a");
  s.submit(sequence("b", 3));
});

Deno.test("submit() refuses a request whose single row may outgrow a frame", () => {
  const s = scheduler({ maxFrameBytes: 2000 });
  s.submit(sequence("a", 3));
  const bias = new Map(Array.from({ length: 300 }, (_, i) => [i, 1]));
  const error = assertThrows(() => s.submit(sequence("b", 3, { bias })), FleetError);
  assertEquals([error.code, error.param], ["too-large", "logit_bias"]);
});

Deno.test("a cancelled sequence is in no later step, and its pages are free when its step returns", () => {
  const s = scheduler();
  s.submit(sequence("a", 40));
  const step = s.nextStep()!;
  s.cancel("a");
  s.cancel("a");
  assertEquals(s.nextStep(), null);
  assertEquals(s.stats.pagesUsed, 1, "the page that the step names");
  assertEquals(s.complete(step.step, answer(step)), []);
  assertEquals([s.stats.pagesUsed, s.stats.running], [0, 0]);
  s.check();
});

Deno.test("when pages run out the youngest is preempted and replayed, prompt and answer in kind", () => {
  const s = scheduler({ pages: 4, maxStepsInFlight: 1 });
  s.submit(sequence("old", 62));
  advance(s);
  advance(s);
  s.submit(sequence("young", 30));
  while (s.stats.preemptions === 0) advance(s);
  assertEquals(s.stats.waiting, 1);
  s.cancel("old");
  const { batch, sequences } = advance(s).step;
  assertEquals(sequences, ["young"]);
  const generated = batch.decodeRows, prompt = batch.rowToken.length - batch.decodeRows;
  assertEquals([prompt, generated > 0], [30, true]);
  assertEquals(
    batch.rowPosition.slice(0, generated),
    Uint32Array.from(
      { length: generated },
      (_, i) => 30 + i,
    ),
  );
  s.check();
});

Deno.test("a short prompt does not wait for long ones to end", () => {
  const s = scheduler({ pages: 200, contextTokens: 2000, maxStepsInFlight: 1 });
  s.submit(sequence("long", 1500));
  s.submit(sequence("longer", 1800));
  advance(s);
  s.submit(sequence("short", 4));
  for (let i = 0; i < 6; i++) {
    if (advance(s).events.some(({ id }) => id === "short")) return;
  }
  throw new Error("short got no token within 6 steps");
});

Deno.test("nobody starves where each step has room for one row", () => {
  const s = scheduler({ maxRows: 1, maxSequencesPerStep: 1, maxOutputs: 1, prefillRowsPerStep: 1 });
  s.submit(sequence("a", 2, { maxTokens: 400 }));
  for (let i = 0; i < 5; i++) advance(s);
  s.submit(sequence("b", 2, { maxTokens: 400 }));
  const tokens: Record<string, number> = { a: 0, b: 0 };
  for (let i = 0; i < 200; i++) for (const { id } of advance(s).events) tokens[id]++;
  assert(tokens.a > 50 && tokens.b > 50, JSON.stringify(tokens));
});

Deno.test("no step's frame exceeds its bound, and all that was asked is done in time", () => {
  const maxFrameBytes = 1200;
  const s = scheduler({ maxFrameBytes });
  const ids = Array.from({ length: 12 }, (_, i) => `s${i}`);
  for (const id of ids) {
    s.submit(sequence(id, 20, {
      maxTokens: 20,
      presencePenalty: 1,
      bias: new Map([[1, 1], [2, -1]]),
    }));
  }
  const ended = new Set<string>();
  for (let i = 0; ended.size < ids.length; i++) {
    assert(i < 2000, "it ends");
    const { step: { batch }, events } = advance(s, i % 50);
    for (const event of events) if (event.type === "finish") ended.add(event.id);
    const samplings = batch.requests.flatMap((r) => r.type === "sample" ? [r.sampling] : []);
    const bytes = stepFrameBytes({
      rows: batch.rowToken.length,
      sequences: batch.sequences.length,
      pageEntries: batch.sequences.reduce((sum, { pages }) => sum + pages.length, 0),
      requests: batch.requests.length,
      biasEntries: samplings.reduce((sum, { biasTokens }) => sum + biasTokens.length, 0),
      countEntries: samplings.reduce((sum, { counts }) => sum + counts.length, 0),
      hiddenSize: 8,
      stages: 1,
    });
    assertLessOrEqual(bytes, maxFrameBytes);
  }
});

Deno.test("sampling parameters carry the whole seed, sorted bias, and counts of generated tokens", () => {
  const s = scheduler();
  s.submit(sequence("a", 3, {
    frequencyPenalty: 0.5,
    bias: new Map([[9, -1], [4, 2]]),
  }));
  for (const token of [8, 6, 8]) advance(s, token);
  const request = s.nextStep()!.batch.requests[0];
  assert(request.type === "sample");
  const { sampling } = request;
  assertEquals([sampling.seedHigh, sampling.seedLow], [0x01234567, 0x89abcdef]);
  assertEquals([sampling.biasTokens, sampling.biasValues], [
    Uint32Array.of(4, 9),
    Float32Array.of(2, -1),
  ]);
  assertEquals([sampling.countTokens, sampling.counts], [
    Uint32Array.of(6, 8),
    Uint32Array.of(1, 2),
  ]);
});

Deno.test("a new epoch starts at step 1 and replays each sequence; what no longer fits ends in an error", () => {
  const s = scheduler();
  s.submit(sequence("a", 6));
  s.submit(sequence("b", 50));
  for (let i = 0; i < 4; i++) advance(s);
  s.nextStep();
  const events = s.requeueAll(config({ contextTokens: 40 }));
  assertEquals(events.map(({ id, type }) => [id, type]), [["b", "error"]]);
  assertEquals(s.stats.stepsInFlight, 0);
  const step = s.nextStep()!;
  assertEquals([step.step, Object.keys(rows(step))], [1, ["a"]]);
  assertEquals(step.batch.rowToken.length - step.batch.decodeRows, 6);
});

Deno.test("abortAll() ends everything with the error", () => {
  const s = scheduler();
  for (const id of ["a", "b"]) s.submit(sequence(id, 5));
  s.nextStep();
  s.cancel("a");
  const events = s.abortAll(new FleetError("unavailable", "gone"));
  assertEquals(events.map(({ id, type }) => [id, type]), [["b", "error"]]);
  assertEquals([s.nextStep(), s.stats.pagesUsed], [null, 0]);
});

Deno.test("results that do not answer the step are refused", () => {
  const s = scheduler();
  s.submit(sequence("a", 3));
  const step = s.nextStep()!;
  for (
    const results of [
      [],
      [{ type: "score", row: 2, logprob: 0 }],
      answer(step).map((r) => ({
        ...r,
        row: 0,
      })),
    ] as RowResult[][]
  ) {
    const error = assertThrows(() => s.complete(step.step, results), FleetError);
    assertEquals(error.code, "bad-frame");
  }
  assertEquals(s.complete(step.step, answer(step)).length, 1);
});
