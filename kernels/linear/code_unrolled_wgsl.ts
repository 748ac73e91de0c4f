/**
 * WGSL of the CodeGEMM decode kernels for GPUs: a turn's code words and scales are loaded into
 * registers first, and every position is code of its own.
 *
 * @module
 */
import { codesPerWord } from "../../shared/model_config.ts";
import type { CodeBody, CodeKernel } from "./code_kernel.ts";
import { addGroup, psumbooksPerHalf, splat, sumVariables } from "./code_kernel.ts";
import { centroidCount, codeInWord, OCTET, OCTET_WEIGHTS, octetQuad } from "./code_words_wgsl.ts";
import { gcd, roundUp } from "./order.ts";
import type { BatchLanes } from "./wgsl.ts";
import { times } from "./wgsl.ts";

/**
 * Psumbooks are made in one half of the workgroup's books while the other half is gathered from, so
 * that one barrier a stage is enough: a half is written again only after everyone has passed the
 * barrier behind its last gather. Each Psumbook is an array of its own, indexed by the code alone.
 */
export function unrolledPsumbook(kernel: CodeKernel, lanes: BatchLanes): CodeBody {
  const { format: { m }, order, threads, rowsPerThread } = kernel;
  const entries = Array.from({ length: kernel.turnPositions * m }, (_, e) => ({
    position: Math.floor(e / m),
    codebook: e % m,
  }));
  // An even number of stages, so that every turn begins with the same half.
  const stages = roundUp(Math.ceil(entries.length / psumbooksPerHalf(kernel)), 2);
  const perStage = Math.ceil(entries.length / stages);
  const book = (stage: number, slot: number, j: number) => `book${stage % 2}_${slot}_${j}`;
  const parts = [takeWords(kernel), loadScales(kernel)];
  for (let stage = 0; stage < stages; stage++) {
    const staged = entries.slice(stage * perStage, (stage + 1) * perStage);
    parts.push(fillStage(kernel, lanes, staged, (slot, j) => book(stage, slot, j)));
    if (stage === 0) parts.push(loadNextWords(kernel));
    parts.push("workgroupBarrier();");
    for (const [slot, { position, codebook }] of staged.entries()) {
      const opens = position % order.groupPositions === 0 && codebook === 0;
      const closes = (position + 1) % order.groupPositions === 0 && codebook === m - 1;
      for (let r = 0; r < rowsPerThread; r++) {
        parts.push(`{ let at = ${codeOf(kernel, position, codebook, r)};`);
        for (let j = 0; j < lanes.vectors; j++) {
          parts.push(`sum${r}_${j} ${opens ? "=" : "+="} ${book(stage, slot, j)}[at];`);
          if (closes) parts.push(addGroup(lanes, scaleOf(kernel, position, r), r, j));
        }
        parts.push("}");
      }
    }
  }
  const books = [0, 1].flatMap((stage) =>
    Array.from(
      { length: perStage },
      (_, slot) =>
        times(
          lanes.vectors,
          (j) => `var<workgroup> ${book(stage, slot, j)}: array<${lanes.type("f16")}, 256>;`,
        ),
    )
  );
  const sets = Math.ceil(256 / threads);
  return {
    declarations: books.join("\n"),
    prologue: sumVariables(kernel, lanes) + "\n" + loadFirstWords(kernel) + "\n" +
      times(sets, (s) => times(m, (k) => loadCentroid(kernel, k, s))),
    turn: parts.join("\n"),
  };
}

/** A stage's Psumbooks. With more than 256 threads, each 256 of them make a share of the positions. */
function fillStage(
  kernel: CodeKernel,
  lanes: BatchLanes,
  staged: { position: number; codebook: number }[],
  book: (slot: number, j: number) => string,
): string {
  const { threads } = kernel;
  const teams = Math.max(1, Math.floor(threads / 256));
  const sets = Math.ceil(256 / threads);
  const perTeam = Math.ceil(staged.length / teams);
  return times(teams, (team) => {
    const own = staged.slice(team * perTeam, (team + 1) * perTeam);
    if (own.length === 0) return "";
    const fill = own.map(({ position, codebook }, i) => {
      const slot = team * perTeam + i;
      const load = i === 0 || own[i - 1].position !== position
        ? loadActivation(kernel, position)
        : "";
      return load +
        times(sets, (set) => {
          const at = (j: number) => `${book(slot, j)}[entry${set}]`;
          const entry = fillEntry(kernel, lanes, { position, codebook, set }, at);
          const partly = teams === 1 && (set + 1) * threads > 256;
          return partly ? `if (lane < ${256 - set * threads}u) ${entry}` : entry;
        });
    }).join("\n");
    return teams === 1 ? `{\n${fill}\n}` : `if (lane / 256u == ${team}u) {\n${fill}\n}`;
  });
}

/** The activations of a position, float32: `a<row>_<element>_<position>`. */
function loadActivation(
  { batch, format: { v }, turnPositions, vectorInput }: CodeKernel,
  position: number,
): string {
  return times(batch, (b) => {
    const at = `x${b} + turn * ${turnPositions * v}u + ${position * v}u`;
    if (!vectorInput) return times(v, (e) => `let a${b}_${e}_${position} = f32(x[${at} + ${e}u]);`);
    return times(
      v / 4,
      (q) =>
        `let q${b}_${q}_${position} = vec4<f32>(x[(${at}) / 4u + ${q}u]);\n` +
        times(
          4,
          (e) => `let a${b}_${4 * q + e}_${position} = q${b}_${q}_${position}.${"xyzw"[e]};`,
        ),
    );
  }) + "\n";
}

/** One thread's entry of a Psumbook: the inner product of its centroid and the activations. */
function fillEntry(
  { batch, format: { v } }: CodeKernel,
  lanes: BatchLanes,
  { position, codebook, set }: { position: number; codebook: number; set: number },
  target: (j: number) => string,
): string {
  const centroid = (e: number) =>
    v % 4 === 0
      ? `f32(c${codebook}_${set}_${e >> 2}.${"xyzw"[e & 3]})`
      : `f32(c${codebook}_${set}_${e})`;
  const chains = times(batch, (b) =>
    `var p${b} = a${b}_0_${position} * ${centroid(0)};\n` +
    Array.from({ length: v - 1 }, (_, e) =>
      `p${b} = fma(a${b}_${e + 1}_${position}, ${centroid(e + 1)}, p${b});`).join("\n"));
  const rows = (j: number) =>
    Array.from({ length: lanes.lanes }, (_, l) => `f16(p${j * lanes.lanes + l})`).join(", ");
  return `{ ${chains}\n` +
    times(
      lanes.vectors,
      (j) => `${target(j)} = ${lanes.lanes === 1 ? rows(j) : `${lanes.type("f16")}(${rows(j)})`};`,
    ) + " }";
}

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
    const opensGroup = position % order.groupPositions === 0;
    const closesGroup = (position + 1) % order.groupPositions === 0;
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
        const opens = q === 0 ? opensGroup : q % 4 === 0;
        const closes = q === quads - 1 ? closesGroup : q % 4 === 3;
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
      return `f32(${pair}.x + ${pair}.y)`;
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

/** A thread's centroid of codebook `k`: `c<codebook>_<set>_<quad or element>`, for entry `entry<set>`. */
function loadCentroid({ format: { m, v }, threads }: CodeKernel, k: number, set: number): string {
  const count = v % 4 === 0 ? v / 4 : v;
  return (k === 0 ? `let entry${set} = (lane + ${set * threads}u) & 255u;\n` : "") +
    times(
      count,
      (e) =>
        `let c${k}_${set}_${e} = codebooks[((book * ${m}u + ${k}u) * 256u + entry${set}) * ${count}u + ${e}u];`,
    );
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

/** With prefetch, the first turn's code words into `next...`, while the first tables are made. */
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
