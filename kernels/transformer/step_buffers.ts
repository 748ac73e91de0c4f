/**
 * The buffers that tell the kernels of a step's rows: made once for a stage's limits, written anew for
 * each step. `queue.writeBuffer` is ordered with submits, so a step may be written while the one
 * before it still runs.
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

/** The inputs of one step after another. */
export class StepBuffers implements StepInputs {
  readonly step: GPUBuffer;
  readonly rows: GPUBuffer;
  readonly pageTables: GPUBuffer;
  readonly tiles: GPUBuffer;
  readonly outputRows: GPUBuffer;
  readonly #gpu: Gpu;
  readonly #tileRows: number;
  readonly #rowWords: Uint32Array<ArrayBuffer>;
  readonly #longest: number;
  readonly #tableWords: Uint32Array<ArrayBuffer>;
  readonly #tileWords: Uint32Array<ArrayBuffer>;
  readonly #outputWords: Uint32Array<ArrayBuffer>;

  /** @param tileRows rows of a prefill tile, see `attention_wgsl.ts` */
  constructor(gpu: Gpu, limits: StageLimits, tileRows: number) {
    this.#gpu = gpu;
    this.#tileRows = tileRows;
    this.#longest = limits.contextTokens;
    this.#rowWords = new Uint32Array(limits.maxRows * ROW_WORDS);
    this.#tableWords = new Uint32Array(limits.maxSequences * pagesPerSequence(limits));
    this.#tileWords = new Uint32Array(limits.maxRows * TILE_WORDS);
    this.#outputWords = new Uint32Array(limits.maxOutputs);
    this.step = gpu.buffer("step", STEP_BYTES, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST);
    this.rows = gpu.storage("step rows", this.#rowWords.byteLength);
    this.pageTables = gpu.storage("step page tables", this.#tableWords.byteLength);
    this.tiles = gpu.storage("step tiles", this.#tileWords.byteLength);
    this.outputRows = gpu.storage("step output rows", this.#outputWords.byteLength);
  }

  /** Writes a batch that is within the limits; returns its counts, those that the GPU is told. */
  write(batch: StepBatch): TransformerShape {
    const tableStarts = this.#packPageTables(batch);
    const rows = batch.rowToken.length;
    let contextTokens = 0;
    for (let row = 0; row < rows; row++) {
      const sequence = batch.rowSequence[row], position = batch.rowPosition[row];
      this.#rowWords.set(
        [tableStarts[sequence], position, batch.rowToken[row], sequence],
        row * ROW_WORDS,
      );
      contextTokens = Math.max(contextTokens, position + 1);
    }
    const prefillTiles = this.#packTiles(batch, tableStarts);
    const outputs = batch.requests.length;
    batch.requests.forEach((request, output) => this.#outputWords[output] = request.row);

    const shape = {
      decodeRows: batch.decodeRows,
      rows,
      outputs,
      contextTokens: this.#coarse(contextTokens),
      prefillTiles,
    };
    this.#gpu.write(this.step, 0, stepWords(shape));
    this.#gpu.write(this.rows, 0, this.#rowWords.subarray(0, rows * ROW_WORDS));
    this.#gpu.write(this.pageTables, 0, this.#tableWords.subarray(0, tableStarts.at(-1)));
    this.#gpu.write(this.tiles, 0, this.#tileWords.subarray(0, prefillTiles * TILE_WORDS));
    this.#gpu.write(this.outputRows, 0, this.#outputWords.subarray(0, outputs));
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
      this.#tableWords.set(pages, start);
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
      this.#tileWords.set([row, end - row, tableStarts[sequence], 0], tiles++ * TILE_WORDS);
      row = end;
    }
    return tiles;
  }
}

/** Entries of the longest page table. */
export function pagesPerSequence(limits: { contextTokens: number }): number {
  return Math.ceil(limits.contextTokens / PAGE_TOKENS);
}
