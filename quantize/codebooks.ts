/**
 * The arithmetic of codebook quantization on plain arrays: k-means, additive codebooks, scales.
 *
 * All functions work on **groups**: runs of `g` consecutive weights of a row that share a scale,
 * one after another in a Float32Array. A group holds `g / v` vectors. The rows of a matrix are
 * groups already, because g divides K.
 *
 * What is minimized is the squared error of the weights, so a vector counts by its squared scale.
 *
 * @module
 */
import { invariant } from "../shared/errors.ts";
import type { CodeGemmFormat } from "../shared/model_config.ts";
import { type Random, randomInt } from "../shared/random.ts";

/** What a quantizer of one matrix may be told. */
export interface CodebookSettings {
  /** Rounds over all codebooks: codes, then centroids, then scales. */
  rounds: number;
}

/** Codes of groups under given codebooks. */
export interface Encoded {
  /** `(groups * g / v, m)`: the codes of a vector lie together. */
  codes: Uint8Array<ArrayBuffer>;
  /** One per group, rounded to float16. */
  scales: Float32Array<ArrayBuffer>;
}

/** Lloyd iterations for each codebook before the rounds begin. */
const START_ITERATIONS = 8;

/**
 * The scale of each group to begin with, until it is refitted to the codes: the root mean square.
 * (Starting from the largest magnitude left 0.2 to 1 % more error after 12 rounds, on matrices of
 * the demo model with m1v4g128 and m2v4g128.) A group of zeros has scale 0.
 */
function startScales(weights: Float32Array, g: number): Float32Array<ArrayBuffer> {
  const scales = new Float32Array(weights.length / g);
  for (let group = 0; group < scales.length; group++) {
    let sum = 0;
    for (let i = group * g; i < (group + 1) * g; i++) sum += weights[i] * weights[i];
    scales[group] = Math.f16round(Math.sqrt(sum / g));
  }
  return scales;
}

/**
 * Trains the codebooks of one matrix on a sample of its groups.
 *
 * @param weights whole groups
 * @returns `(m, 2^b, v)`, rounded to float16
 */
export function trainCodebooks(
  weights: Float32Array,
  format: CodeGemmFormat,
  settings: CodebookSettings,
  random: Random,
): Float32Array<ArrayBuffer> {
  const { m, v, g, b } = format;
  const size = 2 ** b;
  invariant(b === 8 && weights.length % g === 0, "whole groups, codes of a byte");
  const books = new Float32Array(m * size * v);
  const book = (j: number) => books.subarray(j * size * v, (j + 1) * size * v);
  const vectors = weights.length / v;
  const scales = startScales(weights, g);
  const codes = new Uint8Array(vectors * m);

  // One codebook after another, each on what its predecessors leave over.
  const rest = divided(weights, scales, g);
  let importance = vectorImportance(scales, g / v);
  for (let j = 0; j < m; j++) {
    chooseCentroids(rest, importance, book(j), v, random);
    for (let i = 0; i < START_ITERATIONS; i++) {
      assign(rest, book(j), v, codes, m, j);
      moveCentroids(rest, importance, book(j), v, codes, m, j, random);
    }
    assign(rest, book(j), v, codes, m, j);
    addCentroids(rest, book(j), v, codes, m, j, -1);
  }
  // Then all of them again and again, each on what the others leave over.
  for (let round = 0; round < settings.rounds; round++) {
    fitScales(weights, books, format, codes, scales);
    importance = vectorImportance(scales, g / v);
    rest.set(divided(weights, scales, g));
    for (let j = 0; j < m; j++) addCentroids(rest, book(j), v, codes, m, j, -1);
    for (let j = 0; j < m; j++) {
      addCentroids(rest, book(j), v, codes, m, j, 1);
      assign(rest, book(j), v, codes, m, j);
      moveCentroids(rest, importance, book(j), v, codes, m, j, random);
      addCentroids(rest, book(j), v, codes, m, j, -1);
    }
  }
  for (let i = 0; i < books.length; i++) books[i] = Math.f16round(books[i]);
  return books;
}

/**
 * Finds codes and scales for groups under given codebooks: greedy first, then each code again with
 * the others fixed, the scales refitted in between.
 */
export function encodeGroups(
  weights: Float32Array,
  books: Float32Array,
  format: CodeGemmFormat,
): Encoded {
  const { m, v, g, b } = format;
  const bookSize = 2 ** b * v;
  const book = (j: number) => books.subarray(j * bookSize, (j + 1) * bookSize);
  const scales = startScales(weights, g);
  const codes = new Uint8Array(weights.length / v * m);
  for (let pass = 0; pass <= REFIT_PASSES; pass++) {
    const rest = divided(weights, scales, g);
    for (let j = 0; j < m; j++) {
      if (pass > 0) addCentroids(rest, book(j), v, codes, m, j, -1);
    }
    for (let j = 0; j < m; j++) {
      if (pass > 0) addCentroids(rest, book(j), v, codes, m, j, 1);
      assign(rest, book(j), v, codes, m, j);
      addCentroids(rest, book(j), v, codes, m, j, -1);
    }
    fitScales(weights, books, format, codes, scales);
  }
  return { codes, scales };
}

/** More passes gain less than a thousandth of the error. */
const REFIT_PASSES = 3;

/**
 * The weights that codes stand for.
 *
 * @param encoded codes and scales of whole groups
 */
export function decodeGroups(
  encoded: Encoded,
  books: Float32Array,
  format: CodeGemmFormat,
): Float32Array<ArrayBuffer> {
  const { m, v, g, b } = format;
  const out = new Float32Array(encoded.codes.length / m * v);
  for (let j = 0; j < m; j++) {
    addCentroids(out, books.subarray(j * 2 ** b * v), v, encoded.codes, m, j, 1);
  }
  for (let i = 0; i < out.length; i++) out[i] *= encoded.scales[Math.floor(i / g)];
  return out;
}

/** Each weight over its group's scale; groups of scale 0 become zeros. */
function divided(
  weights: Float32Array,
  scales: Float32Array,
  g: number,
): Float32Array<ArrayBuffer> {
  const out = new Float32Array(weights.length);
  for (let group = 0; group < scales.length; group++) {
    const inverse = scales[group] > 0 ? 1 / scales[group] : 0;
    for (let i = group * g; i < (group + 1) * g; i++) out[i] = weights[i] * inverse;
  }
  return out;
}

function vectorImportance(scales: Float32Array, vectorsPerGroup: number): Float32Array {
  const out = new Float32Array(scales.length * vectorsPerGroup);
  for (let i = 0; i < out.length; i++) {
    const scale = scales[Math.floor(i / vectorsPerGroup)];
    out[i] = scale * scale;
  }
  return out;
}

/** Least squares: the scale that brings each group's decoded direction nearest to its weights. */
function fitScales(
  weights: Float32Array,
  books: Float32Array,
  format: CodeGemmFormat,
  codes: Uint8Array<ArrayBuffer>,
  scales: Float32Array<ArrayBuffer>,
): void {
  const { g } = format;
  const ones = new Float32Array(scales.length).fill(1);
  const direction = decodeGroups({ codes, scales: ones }, books, format);
  for (let group = 0; group < scales.length; group++) {
    let along = 0, norm = 0;
    for (let i = group * g; i < (group + 1) * g; i++) {
      along += weights[i] * direction[i];
      norm += direction[i] * direction[i];
    }
    // A direction that points away would turn the codes around: keep the old scale, the next
    // assignment finds better codes.
    if (along > 0) scales[group] = Math.f16round(along / norm);
  }
}

/** `vectors += sign * centroid of each one's j-th code`. */
function addCentroids(
  vectors: Float32Array,
  book: Float32Array,
  v: number,
  codes: Uint8Array,
  m: number,
  j: number,
  sign: 1 | -1,
): void {
  const count = vectors.length / v;
  for (let i = 0; i < count; i++) {
    const at = i * v, centroid = codes[i * m + j] * v;
    for (let d = 0; d < v; d++) vectors[at + d] += sign * book[centroid + d];
  }
}

/**
 * Sets each vector's j-th code to the nearest centroid, the lowest of equals. All of the quantizer's
 * time goes here.
 */
function assign(
  vectors: Float32Array,
  book: Float32Array,
  v: number,
  codes: Uint8Array,
  m: number,
  j: number,
): void {
  const count = vectors.length / v;
  // |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2): the largest x c - |c|^2 / 2 is the nearest. A table row
  // is a centroid and its - |c|^2 / 2; doubles, because V8 would convert floats at every turn.
  const stride = v + 1;
  const table = new Float64Array(book.length / v * stride);
  for (let i = 0; i < book.length; i++) {
    const row = Math.floor(i / v) * stride;
    table[row + i % v] = book[i];
    table[row + v] -= book[i] * book[i] / 2;
  }
  const nearest = v === 4 ? nearestOfFour : nearestOfAny;
  for (let i = 0; i < count; i++) codes[i * m + j] = nearest(vectors, i * v, table, v) / stride;
}

/** Start of the table row nearest to four numbers: 2 to 4 times faster than the general loop. */
function nearestOfFour(vectors: Float32Array, at: number, table: Float64Array): number {
  const x0 = vectors[at], x1 = vectors[at + 1], x2 = vectors[at + 2], x3 = vectors[at + 3];
  let best = 0, bestScore = -Infinity;
  for (let row = 0; row < table.length; row += 5) {
    const score = table[row + 4] + x0 * table[row] + x1 * table[row + 1] + x2 * table[row + 2] +
      x3 * table[row + 3];
    if (score > bestScore) {
      bestScore = score;
      best = row;
    }
  }
  return best;
}

function nearestOfAny(vectors: Float32Array, at: number, table: Float64Array, v: number): number {
  let best = 0, bestScore = -Infinity;
  for (let row = 0; row < table.length; row += v + 1) {
    let score = table[row + v];
    for (let d = 0; d < v; d++) score += vectors[at + d] * table[row + d];
    if (score > bestScore) {
      bestScore = score;
      best = row;
    }
  }
  return best;
}

/** Moves each centroid to the weighted mean of its vectors; one without any goes to a random vector. */
function moveCentroids(
  vectors: Float32Array,
  importance: Float32Array,
  book: Float32Array,
  v: number,
  codes: Uint8Array,
  m: number,
  j: number,
  random: Random,
): void {
  const count = vectors.length / v, size = book.length / v;
  const sums = new Float64Array(book.length), mass = new Float64Array(size);
  for (let i = 0; i < count; i++) {
    const code = codes[i * m + j], weight = importance[i];
    mass[code] += weight;
    for (let d = 0; d < v; d++) sums[code * v + d] += weight * vectors[i * v + d];
  }
  for (let c = 0; c < size; c++) {
    const from = mass[c] > 0 ? undefined : randomInt(random, count) * v;
    for (let d = 0; d < v; d++) {
      book[c * v + d] = from === undefined ? sums[c * v + d] / mass[c] : vectors[from + d];
    }
  }
}

/** Vectors that k-means++ looks at: more cost time and gain nothing measurable. */
const PLUS_PLUS_VECTORS = 16_384;

/**
 * k-means++ (Arthur and Vassilvitskii, 2007): each next centroid is a vector drawn by its squared
 * distance to the nearest one so far, times its importance.
 */
function chooseCentroids(
  vectors: Float32Array,
  importance: Float32Array,
  book: Float32Array,
  v: number,
  random: Random,
): void {
  const count = vectors.length / v, size = book.length / v;
  const pool = Uint32Array.from(
    { length: Math.min(count, PLUS_PLUS_VECTORS) },
    (_, i) => count <= PLUS_PLUS_VECTORS ? i : randomInt(random, count),
  );
  const distance = new Float64Array(pool.length).fill(Infinity);
  let next = pool[randomInt(random, pool.length)];
  for (let c = 0; c < size; c++) {
    book.set(vectors.subarray(next * v, (next + 1) * v), c * v);
    let total = 0;
    for (let p = 0; p < pool.length; p++) {
      let squared = 0;
      for (let d = 0; d < v; d++) {
        const difference = vectors[pool[p] * v + d] - book[c * v + d];
        squared += difference * difference;
      }
      distance[p] = Math.min(distance[p], squared * importance[pool[p]]);
      total += distance[p];
    }
    // With fewer distinct vectors than centroids the total is 0: any vector will do.
    let left = random() * total, p = 0;
    while (p < pool.length - 1 && (left -= distance[p]) > 0) p++;
    next = pool[p];
  }
}
