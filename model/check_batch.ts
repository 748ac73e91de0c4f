/**
 * A stage's door: a batch that passes can be run without looking at it again, and one that does not
 * has touched nothing.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import type { StepBatch } from "../shared/frames.ts";
import { pagesPerSequence } from "../kernels/transformer/mod.ts";
import { LIMITS } from "../shared/limits.ts";
import type { StageSpec } from "./stage_spec.ts";

/**
 * Checks a step against a stage's limits and against itself.
 *
 * @param hidden float16 bits of the previous stage, null for the first one
 * @throws FleetError `bad-frame`
 */
export function checkBatch(spec: StageSpec, batch: StepBatch, hidden: Uint16Array | null): void {
  const { limits, config } = spec;
  const rows = batch.rowToken.length;
  must(rows > 0, "it has no rows");
  atMost("rows", rows, limits.maxRows);
  atMost("sequences", batch.sequences.length, limits.maxSequences);
  atMost("requests", batch.requests.length, limits.maxOutputs);
  atMost("decode rows", batch.decodeRows, rows);
  must(
    batch.rowSequence.length === rows && batch.rowPosition.length === rows,
    "its rows disagree in number",
  );
  checkPages(spec, batch);
  checkRows(spec, batch);
  checkRequests(spec, batch);
  if (spec.first) {
    must(hidden === null, "the first stage embeds, it takes no activations");
  } else {
    const elements = rows * config.hiddenSize;
    must(
      hidden?.length === elements,
      `it carries ${hidden?.length ?? 0} activations where ${elements} belong`,
    );
    checkFinite(hidden);
  }
}

/** Stages clamp what they send to float16's range; anything else would stay in the pages. */
function checkFinite(hidden: Uint16Array): void {
  if (allFinite(hidden)) return;
  const i = hidden.findIndex((bits) => (bits & 0x7c00) === 0x7c00);
  must(false, `activation ${i} is not a finite number`);
}

/**
 * Two at a time, and no branch in the loop: two million of them come with a full step. An exponent
 * of ones, and no other, carries into the sign's place when one is added to it.
 */
function allFinite(hidden: Uint16Array): boolean {
  const odd = hidden.byteOffset % 4 === 0 ? 0 : 1;
  const pairs = (hidden.length - odd) >> 1;
  const words = new Uint32Array(hidden.buffer, hidden.byteOffset + 2 * odd, pairs);
  let carries = 0;
  for (let i = 0; i < pairs; i++) carries |= (words[i] & 0x7c007c00) + 0x04000400;
  if (odd === 1) carries |= (hidden[0] & 0x7c00) + 0x0400;
  if (odd + 2 * pairs < hidden.length) carries |= (hidden[hidden.length - 1] & 0x7c00) + 0x0400;
  return (carries & 0x80008000) === 0;
}

function checkPages({ limits }: StageSpec, batch: StepBatch): void {
  const longest = pagesPerSequence(limits);
  for (const { pages } of batch.sequences) {
    atMost("pages of a sequence", pages.length, longest);
    // A loop of few words: a batch names thousands of pages, while the GPU waits for it.
    for (let i = 0; i < pages.length; i++) {
      if (pages[i] >= limits.pages) below("page", pages[i], limits.pages);
    }
  }
}

/** Rows of a kind rise by position within their sequence, and none writes what another one writes. */
function checkRows({ limits, config }: StageSpec, batch: StepBatch): void {
  const written = new Set<number>();
  let previous = -1;
  for (let row = 0; row < batch.rowToken.length; row++) {
    const sequence = batch.rowSequence[row], position = batch.rowPosition[row];
    below("sequence", sequence, batch.sequences.length);
    below("position", position, limits.contextTokens);
    below("token", batch.rowToken[row], config.vocabSize);
    const covered = batch.sequences[sequence].pages.length * LIMITS.pageTokens;
    must(position < covered, `position ${position} is beyond a page table of ${covered} positions`);
    const follows = row > 0 && row !== batch.decodeRows && batch.rowSequence[row - 1] === sequence;
    must(!follows || position > previous, "the rows of a sequence do not rise");
    previous = position;
    const place = sequence * limits.contextTokens + position;
    must(!written.has(place), `position ${position} of a sequence comes twice`);
    written.add(place);
  }
}

function checkRequests({ config }: StageSpec, batch: StepBatch): void {
  let previous = -1;
  for (const request of batch.requests) {
    below("requested row", request.row, batch.rowToken.length);
    must(request.row > previous, "its requests are not in the order of their rows");
    previous = request.row;
    if (request.type === "score") below("scored token", request.token, config.vocabSize);
  }
}

function must(condition: boolean, what: string): asserts condition {
  if (!condition) throw new FleetError("bad-frame", `The step cannot be run: ${what}`);
}

function atMost(what: string, value: number, bound: number): void {
  must(value >= 0 && value <= bound, `${value} ${what}, at most ${bound} fit`);
}

function below(what: string, value: number, bound: number): void {
  must(value >= 0 && value < bound, `${what} ${value} is not below ${bound}`);
}
