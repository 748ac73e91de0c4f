/**
 * A matrix in codebook format on the GPU, in the making: codes, codebooks and scales in float32,
 * with the operations that dequantize it, differentiate it and choose its codes.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import CODE from "./codes.wgsl" with { type: "text" };
import { LINE_WORKGROUPS, lineWorkgroups, type Operation, type Recorder } from "./operation.ts";
import { reduce } from "./rows.ts";

/** Codes, codebooks and scales of a matrix as plain arrays. */
export interface CodedArrays {
  /** `(N, K / v, m)`, one to a word. */
  codes: Uint32Array<ArrayBuffer>;
  /** `(m, 256, v)` */
  codebooks: Float32Array<ArrayBuffer>;
  /** `(N, K / g)` */
  scales: Float32Array<ArrayBuffer>;
}

const CENTROIDS = 256;
/** Vectors that one workgroup goes through for the codebooks' gradient, at least. */
const CHUNK_VECTORS = 1024;
/** Chunks of a matrix, at most: they bound the memory of partial gradients. */
const MAX_CHUNKS = 512;

/** Some rows of `X'X`, whole: `(rows, K)`. All of it where a buffer holds that much. */
export interface HessianBand {
  buffer: GPUBuffer;
  /** First row. */
  first: number;
  rows: number;
}

/** Rounds over the codebooks of a vector, each given the others. */
const PASSES = 2;
/** Columns that a workgroup of the search holds. */
const MAX_BLOCK = 256;

/** A matrix in codebook format on the GPU. */
export class CodedMatrix {
  readonly codes: GPUBuffer;
  readonly codebooks: GPUBuffer;
  readonly scales: GPUBuffer;
  readonly counts: { codes: number; codebooks: number; scales: number };
  readonly #recorder: Recorder;
  readonly #shape: readonly [n: number, k: number];
  readonly #format: CodeGemmFormat;

  constructor(
    recorder: Recorder,
    shape: readonly [n: number, k: number],
    format: CodeGemmFormat,
    { codes, codebooks, scales }: CodedArrays,
  ) {
    this.#recorder = recorder;
    this.#shape = shape;
    this.#format = format;
    this.counts = { codes: codes.length, codebooks: codebooks.length, scales: scales.length };
    this.codes = recorder.upload("codes", codes);
    this.codebooks = recorder.upload("codebooks", codebooks);
    this.scales = recorder.upload("scales", scales);
  }

  /** Reads everything back. */
  async arrays(): Promise<CodedArrays> {
    const { counts } = this;
    return {
      codes: await this.#recorder.words(this.codes, counts.codes),
      codebooks: await this.#recorder.floats(this.codebooks, counts.codebooks),
      scales: await this.#recorder.floats(this.scales, counts.scales),
    };
  }

  /** Weights into `to (.., K)` from `row` on. */
  dequantize(to: GPUBuffer, row: number): Promise<Operation> {
    return this.#dispatch("dequantize", {
      extra: row,
      buffers: { codes: true, codebooks: true, scales: true, weights: to },
      workgroups: lineWorkgroups(this.#vectors),
    });
  }

  /** Gradients of scales and codebooks from that of the weights, `gradient (.., K)` from `row` on. */
  async backward(
    gradient: GPUBuffer,
    row: number,
  ): Promise<{ operations: Operation[]; codebooks: GPUBuffer; scales: GPUBuffer }> {
    const { m } = this.#format;
    const scales = this.#recorder.buffer("d scales", this.counts.scales);
    const codebooks = this.#recorder.buffer("d codebooks", this.counts.codebooks);
    const { chunk, chunks } = gradientChunks(this.#vectors);
    // Every centroid looks at every code.
    const work = this.counts.codes * CENTROIDS * 4;
    const parts = this.#recorder.buffer("d codebooks parts", chunks * this.counts.codebooks);
    return {
      codebooks,
      scales,
      operations: [
        await this.#dispatch("scales_back", {
          extra: row,
          buffers: { codes: true, codebooks: true, gradient, result: scales },
          workgroups: lineWorkgroups(this.counts.scales),
        }),
        await this.#dispatch("codebooks_back", {
          extra: row,
          columns: chunk,
          buffers: { codes: true, scales: true, gradient, result: parts },
          workgroups: [chunks, m],
          work,
        }),
        await reduce(this.#recorder, parts, codebooks, this.counts.codebooks, chunks),
      ],
    };
  }

  /** Sets every code to what comes nearest to `weights (N, K)`, each codebook given the others. */
  nearest(weights: GPUBuffer, passes = PASSES): Promise<Operation> {
    return this.#dispatch("nearest", {
      passes: this.#format.m === 1 ? 1 : passes,
      buffers: { codes: true, codebooks: true, scales: true, gradient: weights },
      workgroups: lineWorkgroups(this.#vectors, 1),
      work: this.#searchWork(this.counts.codes, passes),
    });
  }

  /**
   * Lowers the Hessian-weighted error by choosing the codes of columns `[first, first + columns)`
   * anew.
   *
   * @param slope `(W_q - W) H (N, K)` before; not changed
   * @param hessian a band with the rows of all these columns
   * @param change how `W_q` changes in these columns, `(N, columns)`
   */
  search(
    slope: GPUBuffer,
    hessian: HessianBand,
    change: GPUBuffer,
    first: number,
    columns: number,
  ): Promise<Operation> {
    invariant(columns <= MAX_BLOCK && columns % this.#format.v === 0, "whole vectors in a block");
    const [n] = this.#shape;
    return this.#dispatch("search", {
      extra: first,
      columns,
      passes: this.#format.m === 1 ? 1 : PASSES,
      buffers: {
        codes: true,
        codebooks: true,
        scales: true,
        gradient: slope,
        hessian: hessian.buffer,
        result: change,
      },
      hessian,
      workgroups: [Math.min(n, LINE_WORKGROUPS), Math.ceil(n / LINE_WORKGROUPS)],
      work: this.#searchWork(n * columns / this.#format.v * this.#format.m, PASSES),
    });
  }

  /** Operations of comparing all centroids for so many codes: products with a v x v matrix. */
  #searchWork(codes: number, passes: number): number {
    const { m, v } = this.#format;
    return codes * CENTROIDS * 2 * v * (v + 2) * (m === 1 ? 1 : passes);
  }

  get #vectors(): number {
    return this.#shape[0] * this.#shape[1] / this.#format.v;
  }

  #dispatch(
    entryPoint: string,
    request: {
      extra?: number;
      columns?: number;
      passes?: number;
      hessian?: HessianBand;
      buffers: {
        codes: true;
        codebooks?: true;
        scales?: true;
        weights?: GPUBuffer;
        gradient?: GPUBuffer;
        hessian?: GPUBuffer;
        result?: GPUBuffer;
      };
      workgroups: readonly [x: number, y?: number];
      work?: number;
    },
  ): Promise<Operation> {
    const [n, k] = this.#shape;
    const { m, v, g } = this.#format;
    const { codebooks, scales, weights, gradient, hessian, result } = request.buffers;
    const bound = [
      this.codes,
      codebooks && this.codebooks,
      scales && this.scales,
      weights,
      gradient,
      hessian,
      result,
    ].map((buffer, i) => ({ buffer, binding: i + 1 })).filter((entry) => entry.buffer);
    return this.#recorder.dispatch({
      label: entryPoint,
      code: CODE,
      entryPoint,
      constants: [
        ...[n, k, m, v, g],
        ...[request.extra ?? 0, request.columns ?? 0, request.passes ?? 0],
        ...[request.hessian?.first ?? 0, 0, 0, 0],
      ],
      buffers: bound.map(({ buffer }) => buffer!),
      bindings: bound.map(({ binding }) => binding),
      workgroups: request.workgroups,
      work: request.work,
    });
  }
}

/** How vectors are cut for the codebooks' gradient: each chunk gives a partial one. */
export function gradientChunks(vectors: number): { chunk: number; chunks: number } {
  const chunk = Math.max(CHUNK_VECTORS, Math.ceil(vectors / MAX_CHUNKS));
  return { chunk, chunks: Math.ceil(vectors / chunk) };
}

/** Root-mean-square scales of each group, to begin with. */
export function rmsScales(weights: Float32Array, g: number): Float32Array<ArrayBuffer> {
  const scales = new Float32Array(weights.length / g);
  for (let group = 0; group < scales.length; group++) {
    let sum = 0;
    for (let i = group * g; i < (group + 1) * g; i++) sum += weights[i] * weights[i];
    scales[group] = Math.sqrt(sum / g);
  }
  return scales;
}

/** A matrix whose codes are all still 0, with given codebooks and its groups' scales. */
export function startArrays(
  weights: Float32Array,
  codebooks: Float32Array<ArrayBuffer>,
  { m, v, g, b }: CodeGemmFormat,
): CodedArrays {
  invariant(2 ** b === CENTROIDS, "codes of a byte");
  return {
    codes: new Uint32Array(weights.length / v * m),
    codebooks: codebooks.slice(),
    scales: rmsScales(weights, g),
  };
}
