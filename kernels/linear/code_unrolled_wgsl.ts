/**
 * WGSL of the dequantizing decode kernel of wide codes for GPUs: a turn's code words and scales are
 * loaded into registers first, and every position is code of its own.
 *
 * @module
 */
import { codesPerWord } from "../../shared/model_config.ts";
import type { CodeBody, CodeKernel } from "./code_kernel.ts";
import { splat } from "./code_kernel.ts";
import { centroidCount, codeInWord, OCTET, OCTET_WEIGHTS, octetQuad } from "./code_words_wgsl.ts";
import { FLOAT16_PAIR_K, gcd } from "./order.ts";
import type { BatchLanes } from "./wgsl.ts";
import { times } from "./wgsl.ts";

/**
 * A code gathers its centroid, which is multiplied with the activations: pairs along K, so that one
 * float16 multiply-add makes two products. For vectors of a multiple of 4.
 *
 * Centroids are gathered from the storage buffer, which should be in a cache: this is for codebooks
 * that do not fit workgroup memory, and `dequantize_wgsl.ts` for the others.
 */
export function unrolledDequantize(kernel: CodeKernel, lanes: BatchLanes): CodeBody {
  const { format, order, rowsPerThread, batch } = kernel;
  const { m, v } = format;
  const quads = v / 4;
  const { groupPositions } = order.dequantize;
  const pairQuads = FLOAT16_PAIR_K / 4;
  const entries = centroidCount(format);
  const octets = gathersOctets(kernel);
  const stored = (k: number, vectors: number) =>
    `codebooks[((book * ${m}u + ${k}u) * ${entries}u + code${k}) * ${vectors}u`;
  const gather = (k: number, q: number) =>
    octets
      ? `vec4<f16>(${octetQuad(`octet${k}_${q >> 1}`, q & 1)})`
      : `${stored(k, quads)} + ${q}u]`;
  const parts = [takeWords(kernel), loadScales(kernel), loadNextWords(kernel)];
  for (let position = 0; position < kernel.turnPositions; position++) {
    const opensGroup = position % groupPositions === 0;
    const closesGroup = (position + 1) % groupPositions === 0;
    parts.push("{", times(batch, (b) => loadQuads(kernel, position, b)));
    for (let r = 0; r < rowsPerThread; r++) {
      parts.push("{", times(m, (k) => `let code${k} = ${codeOf(kernel, position, k, r)};`));
      if (octets) {
        const count = v / OCTET_WEIGHTS;
        parts.push(times(m * count, (at) => {
          const [k, o] = [Math.floor(at / count), at % count];
          return `let octet${k}_${o} = ${stored(k, count)} + ${o}u];`;
        }));
      }
      for (let q = 0; q < quads; q++) {
        const centroid = Array.from({ length: m }, (_, k) => gather(k, q)).join(" + ");
        // A vector longer than the float16 bound is closed in between.
        const opens = q === 0 ? opensGroup : q % pairQuads === 0;
        const closes = q === quads - 1 ? closesGroup : (q + 1) % pairQuads === 0;
        parts.push(`let c${q} = ${centroid};`);
        parts.push(times(batch, (b) => {
          const pair = `pair${r}_${b}`;
          const low = `a${b}_${q}.xy`, high = `a${b}_${q}.zw`;
          return (opens
            ? `${pair} = ${low} * c${q}.xy;`
            : `${pair} = fma(${low}, c${q}.xy, ${pair});`) +
            ` ${pair} = fma(${high}, c${q}.zw, ${pair});`;
        }));
        if (closes) parts.push(addPairs(kernel, lanes, position, r));
      }
      parts.push("}");
    }
    parts.push("}");
  }
  const pairs = times(
    rowsPerThread,
    (r) => times(batch, (b) => `  var pair${r}_${b} = vec2<f16>(0.0h);`),
  );
  return {
    declarations: "",
    prologue: `${pairs}\n${loadFirstWords(kernel)}`,
    turn: parts.join("\n"),
  };
}

/** Whether whole centroids are gathered, eight weights a load. */
function gathersOctets({ family, format }: CodeKernel): boolean {
  return family === "dequantize" && format.v % OCTET_WEIGHTS === 0;
}

/** The activations of a position for place `b` of the batch: `a<b>_<quad>`, float16. */
function loadQuads(
  { format: { v }, turnPositions, vectorInput }: CodeKernel,
  position: number,
  b: number,
): string {
  const at = `x${b} + turn * ${turnPositions * v}u + ${position * v}u`;
  return times(
    v / 4,
    (q) =>
      vectorInput
        ? `let a${b}_${q} = x[(${at}) / 4u + ${q}u];`
        : `let a${b}_${q} = vec4<f16>(${
          [0, 1, 2, 3].map((e) => `x[${at} + ${4 * q + e}u]`).join(", ")
        });`,
  );
}

/** Both chains of a group, scaled, to the float32 accumulators of row `r`. */
function addPairs(kernel: CodeKernel, lanes: BatchLanes, position: number, r: number): string {
  return times(lanes.vectors, (j) => {
    const sums = Array.from({ length: lanes.lanes }, (_, l) => {
      const pair = `pair${r}_${j * lanes.lanes + l}`;
      return `f32(${pair}.x) + f32(${pair}.y)`;
    }).join(", ");
    const type = lanes.type("f32");
    const factor = splat(lanes, "f32", scaleOf(kernel, position, r));
    return `acc${r}_${j} = fma(${factor}, ${type}(${sums}), acc${r}_${j});`;
  });
}

/** The WGSL element of the codebooks binding. */
export function centroidType(kernel: CodeKernel): string {
  if (gathersOctets(kernel)) return OCTET;
  return kernel.format.v % 4 === 0 ? "vec4<f16>" : "f16";
}

/** Calls `body` for each vector of a thread's code words in a turn, with its name and its place. */
function eachWord(kernel: CodeKernel, body: (name: string, at: number) => string): string {
  const { turnPositions, format, rowsPerThread, threads, order } = kernel;
  const { m } = format;
  return times(
    turnPositions / codesPerWord(format),
    (q) =>
      times(
        m,
        (k) =>
          times(rowsPerThread / 4, (t) =>
            body(`${q}_${k}_${t}`, (q * m + k) * (order.rowBlock / 4) + t * threads)),
      ),
  );
}

/** Where a thread's code words of a turn begin, WGSL. */
function wordsAt({ turnPositions, format, order }: CodeKernel, turn: string): string {
  const words = turnPositions / codesPerWord(format) * format.m;
  return `${turn} * ${words * order.rowBlock / 4}u + quad`;
}

/** With prefetch, the first turn's code words into `next...`. */
function loadFirstWords(kernel: CodeKernel): string {
  if (!kernel.prefetch) return "";
  return `  let first_words = ${wordsAt(kernel, "(block_turns + first_turn)")};\n` +
    eachWord(kernel, (name, at) => `  var next${name} = codes[first_words + ${at}u];`);
}

/** The turn's code words, `w<word>_<codebook>_<row quad>`. */
function takeWords(kernel: CodeKernel): string {
  if (kernel.prefetch) return eachWord(kernel, (name) => `let w${name} = next${name};`);
  return `let words = ${wordsAt(kernel, "turn_at")};\n` +
    eachWord(kernel, (name, at) => `let w${name} = codes[words + ${at}u];`);
}

/** With prefetch, the next turn's code words, while this turn's are used. */
function loadNextWords(kernel: CodeKernel): string {
  if (!kernel.prefetch) return "";
  return `if (turn + 1u < end) {
let next_words = ${wordsAt(kernel, "(turn_at + 1u)")};
${eachWord(kernel, (name, at) => `next${name} = codes[next_words + ${at}u];`)}
}`;
}

/** Scales of the turn: `scale<segment>_<row quad>`. */
function loadScales(kernel: CodeKernel): string {
  const { turnPositions, rowsPerThread, threads, order } = kernel;
  const segment = segmentPositions(kernel);
  const rowQuads = order.rowBlock / 4;
  return times(
    turnPositions / segment,
    (s) =>
      `let scale_at${s} = (scale_block + (turn * ${turnPositions}u + ${
        s * segment
      }u) / ${order.scalePositions}u) * ${rowQuads}u + quad;\n` +
      times(
        rowsPerThread / 4,
        (t) => `let scale${s}_${t} = vec4<f32>(scales[scale_at${s} + ${t * threads}u]);`,
      ),
  );
}

/** Positions of a turn that share a scale. */
function segmentPositions({ turnPositions, order }: CodeKernel): number {
  return gcd(turnPositions, order.scalePositions);
}

function scaleOf(kernel: CodeKernel, position: number, r: number): string {
  const segment = Math.floor(position / segmentPositions(kernel));
  return `scale${segment}_${r >> 2}.${"xyzw"[r & 3]}`;
}

function codeOf({ format }: CodeKernel, position: number, codebook: number, r: number): string {
  const perWord = codesPerWord(format);
  const word = `w${Math.floor(position / perWord)}_${codebook}_${r >> 2}.${"xyzw"[r & 3]}`;
  return codeInWord(format, word, position % perWord);
}
