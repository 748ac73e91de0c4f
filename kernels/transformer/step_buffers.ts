/**
 * The buffers that tell the kernels of a step's rows: made once for a stage's limits, written for each
 * step as far as it differs from the one before. `queue.writeBuffer` is ordered with submits, so a
 * step may be written while the one before it still runs.
 *
 * @module
 */
import type { StepBatch } from "../../shared/frames.ts";
import type { StageLimits } from "../../shared/protocol.ts";
import type { Gpu } from "../gpu.ts";
import { STEP_BYTES, stepWords } from "../kernel.ts";
import {
  PAGE_TOKENS,
  ROW_WORDS,
  type StepInputs,
  TILE_WORDS,
  type TransformerShape,
} from "./inputs.ts";

/** Context lengths are told apart in steps of this much: what is past a row's position ends at once. */
const CONTEXT_STEP = 256;

/**
 * A buffer of words and what was last written there. A write costs a staging buffer and, before the
 * step's first kernel, a copy with its barriers; page tables, counts and outputs seldom change while
 * sequences decode.
 */
class StepWords {
  /** The next step's. */
  readonly words: Uint32Array<ArrayBuffer>;
  /** What the buffer holds, which begins as zeros. */
  readonly #written: Uint32Array<ArrayBuffer>;

  constructor(readonly buffer: GPUBuffer, words: number) {
    this.words = new Uint32Array(words);
    this.#written = new Uint32Array(words);
  }

  /** Writes the first `count` words, unless they are there. */
  write(gpu: Gpu, count: number): void {
    const { words } = this, written = this.#written;
    let same = 0;
    while (same < count && words[same] === written[same]) same++;
    if (same === count) return;
    const fresh = words.subarray(0, count);
    gpu.write(this.buffer, 0, fresh);
    written.set(fresh);
  }
}

/** The inputs of one step after another. */
export class StepBuffers implements StepInputs {
  readonly #gpu: Gpu;
  readonly #tileRows: number;
  readonly #longest: number;
  readonly #step: StepWords;
  readonly #rows: StepWords;
  readonly #tables: StepWords;
  readonly #tiles: StepWords;
  readonly #outputs: StepWords;

  /** @param tileRows rows of a prefill tile, see `attention_wgsl.ts` */
  constructor(gpu: Gpu, limits: StageLimits, tileRows: number) {
    this.#gpu = gpu;
    this.#tileRows = tileRows;
    this.#longest = limits.contextTokens;
    const storage = (label: string, words: number) =>
      new StepWords(gpu.storage(label, 4 * words), words);
    this.#step = new StepWords(
      gpu.buffer("step", STEP_BYTES, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST),
      STEP_BYTES / 4,
    );
    this.#rows = storage("step rows", limits.maxRows * ROW_WORDS);
    this.#tables = storage("step page tables", limits.maxSequences * pagesPerSequence(limits));
    this.#tiles = storage("step tiles", limits.maxRows * TILE_WORDS);
    this.#outputs = storage("step output rows", limits.maxOutputs);
  }

  get step(): GPUBuffer {
    return this.#step.buffer;
  }

  get rows(): GPUBuffer {
    return this.#rows.buffer;
  }

  get pageTables(): GPUBuffer {
    return this.#tables.buffer;
  }

  get tiles(): GPUBuffer {
    return this.#tiles.buffer;
  }

  get outputRows(): GPUBuffer {
    return this.#outputs.buffer;
  }

  /** Writes a batch that is within the limits; returns its counts, those that the GPU is told. */
  write(batch: StepBatch): TransformerShape {
    const tableStarts = this.#packPageTables(batch);
    const rows = batch.rowToken.length;
    const { words } = this.#rows;
    let contextTokens = 0;
    for (let row = 0; row < rows; row++) {
      const sequence = batch.rowSequence[row], position = batch.rowPosition[row];
      const at = row * ROW_WORDS;
      words[at] = tableStarts[sequence];
      words[at + 1] = position;
      words[at + 2] = batch.rowToken[row];
      words[at + 3] = sequence;
      contextTokens = Math.max(contextTokens, position + 1);
    }
    const prefillTiles = this.#packTiles(batch, tableStarts);
    const outputs = batch.requests.length;
    batch.requests.forEach((request, output) => this.#outputs.words[output] = request.row);

    const shape = {
      decodeRows: batch.decodeRows,
      rows,
      outputs,
      contextTokens: this.#coarse(contextTokens),
      prefillTiles,
    };
    this.#step.words.set(stepWords(shape));
    this.#step.write(this.#gpu, STEP_BYTES / 4);
    this.#rows.write(this.#gpu, rows * ROW_WORDS);
    this.#tables.write(this.#gpu, tableStarts[tableStarts.length - 1]);
    this.#tiles.write(this.#gpu, prefillTiles * TILE_WORDS);
    this.#outputs.write(this.#gpu, outputs);
    return shape;
  }

  /** Bytes on the GPU. */
  get bytes(): number {
    return this.#buffers().reduce((sum, buffer) => sum + buffer.size, 0);
  }

  destroy(): void {
    this.#buffers().forEach((buffer) => buffer.destroy());
  }

  /** A context length, told apart in steps of {@linkcode CONTEXT_STEP} and within the limits. */
  #coarse(contextTokens: number): number {
    const coarse = Math.ceil(contextTokens / CONTEXT_STEP) * CONTEXT_STEP;
    return Math.max(contextTokens, Math.min(coarse, this.#longest));
  }

  #buffers(): GPUBuffer[] {
    return [this.step, this.rows, this.pageTables, this.tiles, this.outputRows];
  }

  /** Where each sequence's page table starts, and at the end how many words there are. */
  #packPageTables(batch: StepBatch): number[] {
    const starts = [0];
    for (const { pages } of batch.sequences) {
      const start = starts[starts.length - 1];
      this.#tables.words.set(pages, start);
      starts.push(start + pages.length);
    }
    return starts;
  }

  #packTiles(batch: StepBatch, tableStarts: number[]): number {
    const rows = batch.rowToken.length;
    let tiles = 0;
    for (let row = batch.decodeRows; row < rows;) {
      const sequence = batch.rowSequence[row];
      let end = row + 1;
      while (end < rows && end - row < this.#tileRows && batch.rowSequence[end] === sequence) end++;
      this.#tiles.words.set([row, end - row, tableStarts[sequence], 0], tiles++ * TILE_WORDS);
      row = end;
    }
    return tiles;
  }
}

/** Entries of the longest page table. */
export function pagesPerSequence(limits: { contextTokens: number }): number {
  return Math.ceil(limits.contextTokens / PAGE_TOKENS);
}
