/**
 * A model whose every bit is a hash: small enough for hundreds of simulated fleets, and merciless. A
 * KV entry depends on its layer, position, row kind and everything before it, and a token on all KV
 * entries that its row reads back through the page table. A page used twice, a replay with rows of
 * the wrong kind, a step applied out of order: each changes tokens.
 *
 * @module
 */
import type { GenerateRequest } from "../../coordinator/engine.ts";
import { LIMITS } from "../../shared/limits.ts";
import type { RowResult, SamplingParams, StepBatch } from "../../shared/frames.ts";

/** Layers of the model. */
export const LAYERS = 4;
/** Tokens of its vocabulary. */
export const VOCABULARY = 500;

/** Mixes one more word into a hash (the finalizer of MurmurHash3, Austin Appleby, on the sum). */
export function mix(hash: number, word: number): number {
  let h = (Math.imul(hash, 31) + word + 0x9e3779b9) | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

const KIND = { decode: 1, prefill: 2 } as const;

function embed(token: number, kind: keyof typeof KIND): number {
  return mix(mix(1, token), KIND[kind]);
}

function draw(hidden: number, position: number, sampling: SamplingParams): RowResult {
  let h = mix(mix(mix(mix(hidden, position + 1), sampling.seedLow), sampling.seedHigh), 3);
  h = mix(h, sampling.choice);
  for (let i = 0; i < sampling.countTokens.length; i++) {
    h = mix(mix(h, sampling.countTokens[i]), sampling.counts[i]);
  }
  for (const token of sampling.biasTokens) h = mix(h, token);
  return {
    type: "sample",
    row: 0,
    token: h % VOCABULARY,
    logprob: -(h >>> 16) / 65536,
    alternativeTokens: new Uint32Array(0),
    alternativeLogprobs: new Float32Array(0),
  };
}

/** The pages of layers `[from, to)`; they start out full of garbage, as a worker's memory may. */
export class HashStage {
  readonly #from: number;
  readonly #pages: Uint32Array[];

  constructor(range: { from: number; to: number; pages: number; garbage: number }) {
    this.#from = range.from;
    this.#pages = Array.from(
      { length: range.to - range.from },
      () => new Uint32Array(range.pages * LIMITS.pageTokens).fill(range.garbage),
    );
  }

  /** Runs the layers. @param hidden one word per row; null at the first stage */
  run(batch: StepBatch, hidden: Uint32Array | null): Uint32Array {
    const rows = batch.rowToken.length;
    const out = hidden?.slice() ?? batch.rowToken.map((token, row) => embed(token, kind(row)));
    function kind(row: number): keyof typeof KIND {
      return row < batch.decodeRows ? "decode" : "prefill";
    }
    for (const [index, pages] of this.#pages.entries()) {
      const layer = this.#from + index;
      const at = (row: number, position: number) => {
        const table = batch.sequences[batch.rowSequence[row]].pages;
        const page = table[Math.floor(position / LIMITS.pageTokens)];
        return page * LIMITS.pageTokens + position % LIMITS.pageTokens;
      };
      for (let row = 0; row < rows; row++) {
        const entry = mix(mix(out[row], layer), KIND[kind(row)]);
        pages[at(row, batch.rowPosition[row])] = entry;
      }
      for (let row = 0; row < rows; row++) {
        for (let position = 0; position <= batch.rowPosition[row]; position++) {
          out[row] = mix(out[row], pages[at(row, position)]);
        }
      }
    }
    return out;
  }

  /** Answers the requests of a step from the last layer's output. */
  static answer(batch: StepBatch, hidden: Uint32Array): RowResult[] {
    return batch.requests.map((request) => {
      if (request.type !== "sample") throw new Error("only samples are asked for");
      const { row, sampling } = request;
      return { ...draw(hidden[row], batch.rowPosition[row], sampling), row };
    });
  }
}

/** What a request's stream must be, worked out without pages, steps or stages. */
export function expectedStream(
  request: GenerateRequest,
  contextTokens: number,
): { tokens: number[]; reason: "stop" | "length" } {
  const tokens = Array.from(request.promptTokens);
  const counts = new Map<number, number>();
  const cache: number[][] = Array.from({ length: LAYERS }, () => []);
  const penalties = request.presencePenalty !== 0 || request.frequencyPenalty !== 0;
  for (let position = 0;; position++) {
    const rowKind = position < request.promptTokens.length ? "prefill" : "decode";
    let hidden = embed(tokens[position], rowKind);
    for (let layer = 0; layer < LAYERS; layer++) {
      cache[layer].push(mix(mix(hidden, layer), KIND[rowKind]));
      for (const entry of cache[layer]) hidden = mix(hidden, entry);
    }
    if (position < tokens.length - 1) continue;
    const counted = penalties ? [...counts].sort(([a], [b]) => a - b) : [];
    const result = draw(hidden, position, {
      ...request,
      seedLow: Number(request.seed & 0xffffffffn),
      seedHigh: Number(request.seed >> 32n),
      biasTokens: Uint32Array.from([...request.bias.keys()].sort((a, b) => a - b)),
      biasValues: new Float32Array(0),
      countTokens: Uint32Array.from(counted, ([token]) => token),
      counts: Uint32Array.from(counted, ([, count]) => count),
    });
    const { token } = result as Extract<RowResult, { type: "sample" }>;
    tokens.push(token);
    counts.set(token, (counts.get(token) ?? 0) + 1);
    const generated = tokens.slice(request.promptTokens.length);
    if (request.stopTokens.includes(token)) return { tokens: generated, reason: "stop" };
    if (generated.length >= request.maxTokens || tokens.length >= contextTokens) {
      return { tokens: generated, reason: "length" };
    }
  }
}
