/**
 * Bytes to frames, and every way in which bytes can fail to be one.
 *
 * @module
 */
import { FleetError } from "./errors.ts";
import {
  COUNTS,
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
import type {
  Frame,
  FrameOrder,
  ResultFrame,
  RowRequest,
  RowResult,
  SamplingParams,
  StageTrace,
  StepBatch,
  StepFrame,
} from "./frames.ts";
import { LIMITS } from "./limits.ts";

/**
 * A frame from bytes. Its arrays are views of `data`'s buffer (of a copy where `data` is not aligned
 * to eight bytes): whoever transfers one of them to another thread takes them all.
 *
 * @throws FleetError `bad-frame` with the reason, whatever is wrong with it
 */
export function decodeFrame(data: Uint8Array): Frame {
  if (data.byteLength > LIMITS.maxFrameBytes) {
    throw bad(`it has ${data.byteLength} bytes, at most ${LIMITS.maxFrameBytes} are allowed`);
  }
  if (data.byteLength < HEADER_BYTES) throw bad(`it ends within the header`);
  const bytes = data.byteOffset % 8 === 0 && data.buffer instanceof ArrayBuffer
    ? data as Uint8Array<ArrayBuffer>
    : new Uint8Array(data);
  const header = new DataView(bytes.buffer, bytes.byteOffset, HEADER_BYTES);
  if (header.getUint32(0, true) !== MAGIC) throw bad("it does not begin with the magic number");
  const version = header.getUint16(4, true);
  if (version !== VERSION) throw bad(`its version is ${version}, not ${VERSION}`);
  if (header.getUint8(7) !== 0) throw bad("a reserved byte is set");
  const kind = header.getUint8(6);
  const [epoch, attempt, attemptBase, step] = [0, 4, 8, 12].map((at) =>
    header.getUint32(ORDER_AT + at, true)
  );
  if (attempt < 1) throw bad("attempts start at 1");
  if (attemptBase < 1 || attemptBase > step) {
    throw bad(`step ${step} comes before its attempt's first, ${attemptBase}`);
  }
  const issuedAtMs = header.getFloat64(ISSUED_AT, true);
  if (!Number.isFinite(issuedAtMs)) throw bad("its time of issue is not a finite number");
  const traces = header.getUint32(TRACES_AT, true);
  if (traces > LIMITS.maxStages) throw bad(`it has ${traces} traces`);
  const counts = Array.from(
    { length: COUNTS },
    (_, i) => header.getUint32(COUNTS_AT + 4 * i, true),
  );
  const common = { epoch, attempt, attemptBase, step, issuedAtMs };
  if (kind === KIND.step) return decodeStep(bytes, common, traces, counts);
  if (kind === KIND.result) return decodeResult(bytes, common, traces, counts);
  throw bad(`its kind is ${kind}`);
}

type Common = FrameOrder & { issuedAtMs: number };

function decodeStep(
  bytes: Uint8Array<ArrayBuffer>,
  common: Common,
  traceCount: number,
  counts: number[],
): StepFrame {
  const [
    rows,
    decodeRows,
    sequenceCount,
    pageEntries,
    requestCount,
    biasEntries,
    countEntries,
    hiddenSize,
    reserved,
  ] = counts;
  if (reserved !== 0) throw bad("a reserved count is set");
  if (rows < 1 || rows > LIMITS.maxRowsPerStep) throw bad(`it has ${rows} rows`);
  if (decodeRows > rows) throw bad(`${decodeRows} of its ${rows} rows are decode rows`);
  if (sequenceCount < 1 || sequenceCount > LIMITS.maxSequencesPerStep) {
    throw bad(`it has ${sequenceCount} sequences`);
  }
  if (requestCount > LIMITS.maxOutputsPerStep) throw bad(`it has ${requestCount} requests`);
  const reader = new SectionReader(
    bytes,
    stepBytes({
      rows,
      sequences: sequenceCount,
      pageEntries,
      requests: requestCount,
      biasEntries,
      countEntries,
      hiddenSize,
      traces: traceCount,
    }),
  );
  const traces = decodeTraces(reader, traceCount);
  const sampling = reader.f64(requestCount * SAMPLING_VALUES);
  const table = reader.u32(requestCount * REQUEST_WORDS);
  const pageCounts = reader.u32(sequenceCount);
  const pages = reader.u32(pageEntries);
  const rowPosition = reader.u32(rows);
  const rowToken = reader.u32(rows);
  const sparse: SparseSections = {
    biasTokens: reader.u32(biasEntries),
    biasValues: reader.f32(biasEntries),
    countTokens: reader.u32(countEntries),
    counts: reader.u32(countEntries),
    bias: 0,
    count: 0,
  };
  const hidden = hiddenSize > 0 ? reader.u16(rows * hiddenSize) : null;
  const rowSequence = reader.u16(rows);

  let page = 0;
  const sequences = Array.from(pageCounts, (entries) => {
    if (entries > pageEntries - page) throw bad("its page tables overlap the end of their section");
    return { pages: pages.subarray(page, page += entries) };
  });
  if (page !== pageEntries) throw bad(`${pageEntries - page} page entries belong to no sequence`);
  const batch = { sequences, rowSequence, rowPosition, rowToken, decodeRows, requests: [] };
  checkRows(batch);

  const requests: RowRequest[] = [];
  let lastRow = -1;
  for (let r = 0; r < requestCount; r++) {
    const words = table.subarray(r * REQUEST_WORDS, (r + 1) * REQUEST_WORDS);
    const values = sampling.subarray(r * SAMPLING_VALUES, (r + 1) * SAMPLING_VALUES);
    const row = words[1];
    if (row >= rows) throw bad(`a request is for row ${row} of ${rows}`);
    if (row <= lastRow) throw bad("its requests are not in rising order of rows");
    lastRow = row;
    requests.push(decodeRequest(row, words, values, sparse));
  }
  if (sparse.bias !== biasEntries || sparse.count !== countEntries) {
    throw bad("bias or count entries belong to no request");
  }
  return { type: "step", ...common, batch: { ...batch, requests }, hidden, traces };
}

interface SparseSections {
  biasTokens: Uint32Array<ArrayBuffer>;
  biasValues: Float32Array<ArrayBuffer>;
  countTokens: Uint32Array<ArrayBuffer>;
  counts: Uint32Array<ArrayBuffer>;
  /** Entries taken so far. */
  bias: number;
  count: number;
}

/** `words` and `values`: the request's row of the two tables. Takes its entries off `sparse`. */
function decodeRequest(
  row: number,
  words: Uint32Array,
  values: Float64Array,
  sparse: SparseSections,
): RowRequest {
  const [type, , token, topK, seedLow, seedHigh, choice, alternatives, biased, counted] = words;
  if (type !== TYPE.sample) {
    const known = type === TYPE.score || type === TYPE.logits;
    if (!known) throw bad(`row ${row} asks for something unknown (${type})`);
    const unused = type === TYPE.score ? 3 : 2;
    if (
      words.subarray(unused).some((word) => word !== 0) ||
      values.some((value) => !Object.is(value, 0))
    ) {
      throw bad(`row ${row} has sampling parameters but does not sample`);
    }
    return type === TYPE.score ? { type: "score", row, token } : { type: "logits", row };
  }
  const [temperature, topP, presencePenalty, frequencyPenalty] = values;
  if (token !== 0) throw bad(`row ${row} both samples and scores`);
  if (!values.every(Number.isFinite)) throw bad(`row ${row} has a parameter that is not finite`);
  if (temperature < 0) throw bad(`row ${row} has a negative temperature`);
  if (topP <= 0 || topP > 1) throw bad(`row ${row} has top_p ${topP}`);
  if (alternatives > LIMITS.maxAlternatives) {
    throw bad(`row ${row} asks for ${alternatives} alternatives`);
  }
  if (
    biased > LIMITS.maxBiasEntries || biased > sparse.biasTokens.length - sparse.bias ||
    counted > LIMITS.maxCountEntries || counted > sparse.countTokens.length - sparse.count
  ) throw bad(`row ${row} has more bias or count entries than allowed or sent`);
  const params: SamplingParams = {
    temperature,
    topP,
    topK,
    seedLow,
    seedHigh,
    choice,
    presencePenalty,
    frequencyPenalty,
    biasTokens: sparse.biasTokens.subarray(sparse.bias, sparse.bias + biased),
    biasValues: sparse.biasValues.subarray(sparse.bias, sparse.bias + biased),
    countTokens: sparse.countTokens.subarray(sparse.count, sparse.count + counted),
    counts: sparse.counts.subarray(sparse.count, sparse.count + counted),
    alternatives,
  };
  sparse.bias += biased;
  sparse.count += counted;
  if (!params.biasValues.every(Number.isFinite)) throw bad(`row ${row} has a bias without a value`);
  if (!distinct(params.biasTokens) || !distinct(params.countTokens)) {
    throw bad(`row ${row} names a token twice`);
  }
  return { type: "sample", row, sampling: params };
}

/** The order of rows that `frames.ts` promises, and that page tables cover every position. */
function checkRows(batch: StepBatch): void {
  const { sequences, rowSequence, rowPosition, decodeRows } = batch;
  const rows = rowSequence.length;
  /** Positions of a sequence's first decode row, of its prefill rows only those below it may be. */
  const firstDecode = new Map<number, number>();
  const seen = new Set<number>();
  for (let row = 0; row < rows; row++) {
    const sequence = rowSequence[row], position = rowPosition[row];
    if (sequence >= sequences.length) throw bad(`row ${row} is of a sequence that is not there`);
    if (position >= sequences[sequence].pages.length * LIMITS.pageTokens) {
      throw bad(`no page holds position ${position} of row ${row}`);
    }
    if (row === decodeRows) seen.clear();
    const together = row !== 0 && row !== decodeRows && rowSequence[row - 1] === sequence;
    if (together && position <= rowPosition[row - 1]) {
      throw bad(`the positions of a sequence do not rise at row ${row}`);
    }
    if (!together && seen.has(sequence)) {
      throw bad(`the rows of a sequence do not stand together at row ${row}`);
    }
    seen.add(sequence);
    if (row < decodeRows) {
      if (!together) firstDecode.set(sequence, position);
    } else if (position >= (firstDecode.get(sequence) ?? Infinity)) {
      throw bad(`prefill row ${row} is not before the decode rows of its sequence`);
    }
  }
}

function decodeResult(
  bytes: Uint8Array<ArrayBuffer>,
  common: Common,
  traceCount: number,
  counts: number[],
): ResultFrame {
  const [resultCount, alternatives, logits, ...reserved] = counts;
  if (reserved.some((count) => count !== 0)) throw bad("a reserved count is set");
  if (resultCount > LIMITS.maxOutputsPerStep) throw bad(`it has ${resultCount} results`);
  const reader = new SectionReader(
    bytes,
    resultBytes({ results: resultCount, alternatives, logits, traces: traceCount }),
  );
  const traces = decodeTraces(reader, traceCount);
  const logprobs = reader.f64(resultCount);
  const table = reader.u32(resultCount * RESULT_WORDS);
  const alternativeTokens = reader.u32(alternatives);
  const alternativeLogprobs = reader.f32(alternatives);
  const allLogits = reader.f32(logits);

  const results: RowResult[] = [];
  let alternative = 0, logit = 0, lastRow = -1;
  for (let r = 0; r < resultCount; r++) {
    const [type, row, token, entries] = table.subarray(r * RESULT_WORDS, (r + 1) * RESULT_WORDS);
    const logprob = logprobs[r];
    if (row >= LIMITS.maxRowsPerStep) throw bad(`a result is for row ${row}`);
    if (row <= lastRow) throw bad("its results are not in rising order of rows");
    lastRow = row;
    if (!(logprob < Infinity)) throw bad(`the log-probability of row ${row} is not a number`);
    if (type === TYPE.sample) {
      if (entries > LIMITS.maxAlternatives || entries > alternatives - alternative) {
        throw bad(`row ${row} has more alternatives than allowed or sent`);
      }
      const from = alternative, to = alternative += entries;
      const figures = alternativeLogprobs.subarray(from, to);
      if (!figures.every((figure) => figure < Infinity)) {
        throw bad(`an alternative of row ${row} has no log-probability`);
      }
      results.push({
        type: "sample",
        row,
        token,
        logprob,
        alternativeTokens: alternativeTokens.subarray(from, to),
        alternativeLogprobs: figures,
      });
    } else if (type === TYPE.score) {
      if (token !== 0 || entries !== 0) throw bad(`row ${row} has more than its score`);
      results.push({ type: "score", row, logprob });
    } else if (type === TYPE.logits) {
      if (token !== 0 || !Object.is(logprob, 0)) throw bad(`row ${row} has more than its logits`);
      if (entries > logits - logit) throw bad(`row ${row} has more logits than sent`);
      results.push({ type: "logits", row, logits: allLogits.subarray(logit, logit += entries) });
    } else throw bad(`row ${row} has an unknown result (${type})`);
  }
  if (alternative !== alternatives || logit !== logits) {
    throw bad("alternatives or logits belong to no result");
  }
  return { type: "result", ...common, results, traces };
}

function decodeTraces(reader: SectionReader, count: number): StageTrace[] {
  const values = reader.f64(count * TRACE_VALUES);
  if (!values.every(Number.isFinite)) throw bad("a trace holds something that is not a number");
  return Array.from({ length: count }, (_, t) => {
    const [receivedAtMs, startedAtMs, gpuMs, readbackMs, sentAtMs] = values
      .subarray(t * TRACE_VALUES, (t + 1) * TRACE_VALUES);
    return { receivedAtMs, startedAtMs, gpuMs, readbackMs, sentAtMs };
  });
}

/** Usually tokens are sorted, so a look at the neighbours suffices. */
function distinct(tokens: Uint32Array): boolean {
  for (let i = 1; i < tokens.length; i++) {
    if (tokens[i] <= tokens[i - 1]) return new Set(tokens).size === tokens.length;
  }
  return true;
}

/** Hands out the sections of a frame whose length was found right. */
class SectionReader {
  readonly #bytes: Uint8Array<ArrayBuffer>;
  #at = HEADER_BYTES;

  constructor(bytes: Uint8Array<ArrayBuffer>, expected: number) {
    if (bytes.byteLength !== expected) {
      throw bad(`it has ${bytes.byteLength} bytes, its header says ${expected}`);
    }
    this.#bytes = bytes;
  }

  f64(length: number): Float64Array<ArrayBuffer> {
    return new Float64Array(this.#bytes.buffer, this.#take(8 * length), length);
  }

  u32(length: number): Uint32Array<ArrayBuffer> {
    return new Uint32Array(this.#bytes.buffer, this.#take(4 * length), length);
  }

  f32(length: number): Float32Array<ArrayBuffer> {
    return new Float32Array(this.#bytes.buffer, this.#take(4 * length), length);
  }

  u16(length: number): Uint16Array<ArrayBuffer> {
    return new Uint16Array(this.#bytes.buffer, this.#take(2 * length), length);
  }

  #take(bytes: number): number {
    const at = this.#bytes.byteOffset + this.#at;
    this.#at += bytes;
    return at;
  }
}

function bad(reason: string): FleetError {
  return new FleetError("bad-frame", `A frame was refused: ${reason}`);
}
