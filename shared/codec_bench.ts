/**
 * What a frame costs at each hop: a decode step of one row, and a full mixed step, at the hidden size
 * of a 70B model.
 *
 * @module
 */
import { decodeFrame, encodeFrame } from "./codec.ts";
import type { StepFrame } from "./frames.ts";

/** A step of `rows` decode rows, each of its own sequence of 2048 tokens, that sample. */
function decodeStep(rows: number, hiddenSize: number): StepFrame {
  return {
    type: "step",
    epoch: 1,
    attempt: 1,
    attemptBase: 1,
    step: 1,
    issuedAtMs: 0,
    batch: {
      sequences: Array.from({ length: rows }, () => ({ pages: new Uint32Array(64) })),
      rowSequence: Uint16Array.from({ length: rows }, (_, row) => row),
      rowPosition: new Uint32Array(rows).fill(2047),
      rowToken: new Uint32Array(rows),
      decodeRows: rows,
      requests: Array.from({ length: rows }, (_, row) => ({
        type: "sample",
        row,
        sampling: {
          temperature: 1,
          topP: 0.9,
          topK: 0,
          seedLow: 1,
          seedHigh: 2,
          choice: 0,
          presencePenalty: 0.5,
          frequencyPenalty: 0.5,
          biasTokens: new Uint32Array(),
          biasValues: new Float32Array(),
          countTokens: Uint32Array.from({ length: 300 }, (_, i) => i),
          counts: new Uint32Array(300).fill(1),
          alternatives: 0,
        },
      })),
    },
    hidden: new Uint16Array(rows * hiddenSize),
    traces: [{ receivedAtMs: 0, startedAtMs: 0, gpuMs: 0, readbackMs: 0, sentAtMs: 0 }],
  };
}

for (const rows of [1, 8, 32]) {
  const frame = decodeStep(rows, 8192);
  const bytes = encodeFrame(frame);
  const name = `${rows} rows at hidden 8192 (${bytes.byteLength} bytes)`;
  Deno.bench(`encode + decode, ${name}`, { baseline: rows === 1 }, () => {
    decodeFrame(encodeFrame(frame));
  });
}
