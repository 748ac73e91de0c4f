/**
 * Frames to bytes, laid out as `frame_layout.ts` says.
 *
 * @module
 */
import { FleetError, invariant } from "./errors.ts";
import {
  COUNTS_AT,
  HEADER_BYTES,
  ISSUED_AT,
  KIND,
  MAGIC,
  ORDER_AT,
  REQUEST_WORDS,
  RESULT_WORDS,
  resultBytes,
  SAMPLING_VALUES,
  stepBytes,
  TRACE_VALUES,
  TRACES_AT,
  TYPE,
  VERSION,
} from "./frame_layout.ts";
import type { Frame, FrameOrder, ResultFrame, StageTrace, StepFrame } from "./frames.ts";
import { LIMITS } from "./limits.ts";

/**
 * A frame as bytes, in a buffer of its own.
 *
 * @throws FleetError `too-large` when it exceeds `LIMITS.maxFrameBytes`
 */
export function encodeFrame(frame: Frame): Uint8Array<ArrayBuffer> {
  return frame.type === "step" ? encodeStep(frame) : encodeResult(frame);
}

function encodeStep(frame: StepFrame): Uint8Array<ArrayBuffer> {
  const { sequences, requests, rowSequence, rowPosition, rowToken, decodeRows } = frame.batch;
  const rows = rowToken.length;
  invariant(rowSequence.length === rows && rowPosition.length === rows, "one entry per row");
  const hiddenSize = frame.hidden ? frame.hidden.length / Math.max(1, rows) : 0;
  invariant(Number.isInteger(hiddenSize), "hidden holds whole rows");
  invariant(!frame.hidden || hiddenSize > 0, "rows of activations are not empty");
  let pageEntries = 0, biasEntries = 0, countEntries = 0;
  for (const { pages } of sequences) pageEntries += pages.length;
  for (const request of requests) {
    if (request.type !== "sample") continue;
    biasEntries += request.sampling.biasTokens.length;
    countEntries += request.sampling.countTokens.length;
  }
  const traces = frame.traces.length;
  const writer = new SectionWriter(
    stepBytes({
      rows,
      sequences: sequences.length,
      pageEntries,
      requests: requests.length,
      biasEntries,
      countEntries,
      hiddenSize,
      traces,
    }),
  );
  writer.header(KIND.step, frame, [
    rows,
    decodeRows,
    sequences.length,
    pageEntries,
    requests.length,
    biasEntries,
    countEntries,
    hiddenSize,
  ]);
  const sampling = writer.f64(requests.length * SAMPLING_VALUES);
  const table = writer.u32(requests.length * REQUEST_WORDS);
  const pageCounts = writer.u32(sequences.length);
  const pages = writer.u32(pageEntries);
  writer.u32(rows).set(rowPosition);
  writer.u32(rows).set(rowToken);
  const biasTokens = writer.u32(biasEntries), biasValues = writer.f32(biasEntries);
  const countTokens = writer.u32(countEntries), counts = writer.u32(countEntries);
  if (frame.hidden) writer.u16(frame.hidden.length).set(frame.hidden);
  writer.u16(rows).set(rowSequence);

  let page = 0;
  for (let s = 0; s < sequences.length; s++) {
    pageCounts[s] = sequences[s].pages.length;
    pages.set(sequences[s].pages, page);
    page += sequences[s].pages.length;
  }
  let bias = 0, count = 0;
  for (let r = 0; r < requests.length; r++) {
    const request = requests[r];
    const at = r * REQUEST_WORDS;
    table[at] = TYPE[request.type];
    table[at + 1] = request.row;
    if (request.type === "score") table[at + 2] = request.token;
    if (request.type !== "sample") continue;
    const params = request.sampling;
    invariant(params.biasTokens.length === params.biasValues.length, "one value per biased token");
    invariant(params.countTokens.length === params.counts.length, "one count per counted token");
    table[at + 3] = params.topK;
    table[at + 4] = params.seedLow;
    table[at + 5] = params.seedHigh;
    table[at + 6] = params.choice;
    table[at + 7] = params.alternatives;
    table[at + 8] = params.biasTokens.length;
    table[at + 9] = params.countTokens.length;
    sampling[r * SAMPLING_VALUES] = params.temperature;
    sampling[r * SAMPLING_VALUES + 1] = params.topP;
    sampling[r * SAMPLING_VALUES + 2] = params.presencePenalty;
    sampling[r * SAMPLING_VALUES + 3] = params.frequencyPenalty;
    biasTokens.set(params.biasTokens, bias);
    biasValues.set(params.biasValues, bias);
    countTokens.set(params.countTokens, count);
    counts.set(params.counts, count);
    bias += params.biasTokens.length;
    count += params.countTokens.length;
  }
  return writer.done();
}

function encodeResult(frame: ResultFrame): Uint8Array<ArrayBuffer> {
  const { results } = frame;
  let alternatives = 0, logits = 0;
  for (const result of results) {
    if (result.type === "sample") alternatives += result.alternativeTokens.length;
    if (result.type === "logits") logits += result.logits.length;
  }
  const writer = new SectionWriter(
    resultBytes({ results: results.length, alternatives, logits, traces: frame.traces.length }),
  );
  writer.header(KIND.result, frame, [results.length, alternatives, logits]);
  const logprobs = writer.f64(results.length);
  const table = writer.u32(results.length * RESULT_WORDS);
  const alternativeTokens = writer.u32(alternatives);
  const alternativeLogprobs = writer.f32(alternatives);
  const allLogits = writer.f32(logits);

  let alternative = 0, logit = 0;
  for (let r = 0; r < results.length; r++) {
    const result = results[r];
    const at = r * RESULT_WORDS;
    table[at] = TYPE[result.type];
    table[at + 1] = result.row;
    if (result.type === "logits") {
      table[at + 3] = result.logits.length;
      allLogits.set(result.logits, logit);
      logit += result.logits.length;
      continue;
    }
    logprobs[r] = result.logprob;
    if (result.type === "score") continue;
    const entries = result.alternativeTokens.length;
    invariant(entries === result.alternativeLogprobs.length, "one figure per alternative");
    table[at + 2] = result.token;
    table[at + 3] = entries;
    alternativeTokens.set(result.alternativeTokens, alternative);
    alternativeLogprobs.set(result.alternativeLogprobs, alternative);
    alternative += entries;
  }
  return writer.done();
}

/** Hands out the sections of a new frame one after the other. */
class SectionWriter {
  readonly #buffer: ArrayBuffer;
  #at = HEADER_BYTES;

  constructor(bytes: number) {
    if (bytes > LIMITS.maxFrameBytes) {
      throw new FleetError(
        "too-large",
        `A frame of ${bytes} bytes exceeds the bound of ${LIMITS.maxFrameBytes}; ` +
          "ask for fewer rows of logits, or a smaller step",
      );
    }
    this.#buffer = new ArrayBuffer(bytes);
  }

  header(
    kind: number,
    frame: FrameOrder & { issuedAtMs: number; traces: StageTrace[] },
    counts: number[],
  ): void {
    const view = new DataView(this.#buffer);
    view.setUint32(0, MAGIC, true);
    view.setUint16(4, VERSION, true);
    view.setUint8(6, kind);
    const order = [frame.epoch, frame.attempt, frame.attemptBase, frame.step];
    for (let i = 0; i < order.length; i++) view.setUint32(ORDER_AT + 4 * i, order[i], true);
    view.setFloat64(ISSUED_AT, frame.issuedAtMs, true);
    view.setUint32(TRACES_AT, frame.traces.length, true);
    for (let i = 0; i < counts.length; i++) view.setUint32(COUNTS_AT + 4 * i, counts[i], true);
    const values = this.f64(frame.traces.length * TRACE_VALUES);
    for (let t = 0; t < frame.traces.length; t++) {
      const trace = frame.traces[t];
      values[t * TRACE_VALUES] = trace.receivedAtMs;
      values[t * TRACE_VALUES + 1] = trace.startedAtMs;
      values[t * TRACE_VALUES + 2] = trace.gpuMs;
      values[t * TRACE_VALUES + 3] = trace.readbackMs;
      values[t * TRACE_VALUES + 4] = trace.sentAtMs;
    }
  }

  f64(length: number): Float64Array<ArrayBuffer> {
    return new Float64Array(this.#buffer, this.#take(8 * length), length);
  }

  u32(length: number): Uint32Array<ArrayBuffer> {
    return new Uint32Array(this.#buffer, this.#take(4 * length), length);
  }

  f32(length: number): Float32Array<ArrayBuffer> {
    return new Float32Array(this.#buffer, this.#take(4 * length), length);
  }

  u16(length: number): Uint16Array<ArrayBuffer> {
    return new Uint16Array(this.#buffer, this.#take(2 * length), length);
  }

  done(): Uint8Array<ArrayBuffer> {
    invariant(this.#at === this.#buffer.byteLength, "the sections fill the frame");
    return new Uint8Array(this.#buffer);
  }

  #take(bytes: number): number {
    const at = this.#at;
    this.#at += bytes;
    return at;
  }
}
