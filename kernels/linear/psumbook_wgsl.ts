/**
 * WGSL of the decode kernel with Psumbooks (arXiv 2512.17970) for GPUs: the inner products of all 256
 * centroids with the activations at a position are made in workgroup memory; a code gathers its
 * partial sum. One thread holds a few rows of N, one workgroup a split of K.
 *
 * An entry is made in pairs along K, so that one float16 multiply-add makes two products: a chain of
 * the even and one of the odd elements, then added; of more elements than may be summed in float16, in
 * float32 from there on. The entries of a group of positions are summed in float16 by position, then
 * by codebook; groups, with their scales, in float32 through a split; splits as `reduce_wgsl.ts` says.
 * No shape of a kernel changes that.
 *
 * Psumbooks are made in one half of the workgroup's books while the other half is gathered from, so
 * that one barrier a stage is enough: a half is written again only after everyone has passed the
 * barrier behind its last gather. For the same reason none is needed before the activations of further
 * turns are put over those that all Psumbooks have been made of.
 *
 * Array indices that are not constant cost two instructions each, because WGSL's implementations clamp
 * them: so a book's half and round are constant, and a code becomes its index in one instruction where
 * there are packed dot products.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import { codesPerWord } from "../../shared/model_config.ts";
import { codeInWord } from "./code_words_wgsl.ts";
import { FLOAT16_SUM } from "./order.ts";
import {
  positionQuads,
  type PsumbookKernel,
  stageRounds,
  threadCodebooks,
  threadEntries,
} from "./psumbook_kernel.ts";
import { eachScale, eachWord, scaleOf, threadRowsWgsl, wordOf } from "./thread_rows_wgsl.ts";
import { batchLanes, batchRowsWgsl, HEADER_WGSL, putWgsl, type Target, times } from "./wgsl.ts";

/** Products of two neighbours along K that may be summed in float16. */
const CHAIN = FLOAT16_SUM / 2;

/**
 * The kernel's code; dispatched over (columns of N, splits, batches of rows).
 *
 * @param target what to do with the sums; partial ones go to the scratch
 */
export function psumbookKernelWgsl(kernel: PsumbookKernel, target: Target): string {
  const { format: { m, v, b }, order, batch, threads, teams, rowsPerThread } = kernel;
  const { turnPositions, inputTurns, prefetch, vectorInput } = kernel;
  invariant(b === 8, "Psumbooks have an entry for each byte");
  const lanes = batchLanes(batch);
  const quads = positionQuads(kernel.format);
  const turns = order.unitPositions / turnPositions;
  const teamThreads = threads / teams;
  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<${vectorInput ? "vec4<f16>" : "f16"}>;
@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> codebooks: array<${v % 4 === 0 ? "vec4<f16>" : "f16"}>;
@group(0) @binding(5) var<storage, read> scales: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> y: array<${
    target === "partial" ? "vec4<f32>" : "f32"
  }>;
// By half, round of a stage, team and entry.
var<workgroup> books: array<array<array<${lanes.type("f16")}, ${teams * 256}>, ${
    stageRounds(kernel)
  }>, 2>;
// By position, row of the step and four of K.
var<workgroup> inputs: array<array<vec4<f16>, ${batch * quads}>, ${inputTurns * turnPositions}>;
${target === "partial" ? "" : putWgsl(target)}

@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
${batchRowsWgsl(batch)}
${threadRowsWgsl(kernel, threads, "lane")}
  let split = workgroup.y;
  let first_turn = split * params.split_units * ${turns}u;
  let end = min((split + 1u) * params.split_units, params.units) * ${turns}u;
${
    prefetch
      ? loadWords(kernel, "first_turn", (name) => `var next${name}`) + "\n" +
        loadScales(kernel, "first_turn", (name) => `var next_scale${name}`)
      : ""
  }
  let team = lane / ${teamThreads}u;
  let entry = lane % ${teamThreads}u;
${loadCentroids(kernel)}
${
    times(rowsPerThread, (r) =>
      `  var acc${r} = ${lanes.type("f32")}(); var sum${r} = ${lanes.type("f16")}();`)
  }
  for (var chunk = first_turn; chunk < end; chunk += ${inputTurns}u) {
    let chunk_end = min(chunk + ${inputTurns}u, end);
${loadInputs(kernel)}
    workgroupBarrier();
    for (var turn = chunk; turn < chunk_end; turn++) {
      let input = (turn - chunk) * ${turnPositions}u${teams > m ? ` + team / ${m}u` : ""};
${turn(kernel)}
    }
  }
${target === "partial" ? storePartial(kernel) : storeWhole(kernel)}
}
`;
}

/** A thread's centroids: `c<which of its codebooks>_<which of its entries>_<quad>`. */
function loadCentroids(kernel: PsumbookKernel): string {
  const { format: { m, v }, threads, teams } = kernel;
  const quads = positionQuads(kernel.format);
  const codebook = (i: number) => teams > m ? `team % ${m}u` : `team + ${i * teams}u`;
  return times(threadEntries(kernel), (s) => {
    const at = `entry + ${s * threads / teams}u`;
    return `  let fill${s} = team * 256u + ${at};\n` +
      times(threadCodebooks(kernel), (i) => {
        const centroid = `((book * ${m}u + ${codebook(i)}) * 256u + ${at})`;
        return times(
          quads,
          (q) =>
            `  let c${i}_${s}_${q} = ${
              v % 4 === 0
                ? `codebooks[${centroid} * ${quads}u + ${q}u]`
                : quadOf(v, q, (e) => `codebooks[${centroid} * ${v}u + ${e}u]`)
            };`,
        );
      });
  });
}

/** Four elements of a vector, zeros past its last one. */
function quadOf(v: number, quad: number, element: (e: number) => string): string {
  const elements = [0, 1, 2, 3].map((i) => 4 * quad + i);
  return `vec4<f16>(${elements.map((e) => e < v ? element(e) : "0.0h").join(", ")})`;
}

/**
 * The activations of the chunk's turns, for all rows of the step.
 *
 * The halves of a four change places. Loads of 8 and 16 bytes put halves into even and odd registers
 * by turns; crosswise, the two that are multiplied come from different banks of an NVIDIA GPU's
 * register file, and the sum never makes three of one.
 */
function loadInputs(kernel: PsumbookKernel): string {
  const { format: { v }, batch, threads, turnPositions, vectorInput } = kernel;
  const quads = positionQuads(kernel.format);
  const quad = (b: number, q: number) =>
    vectorInput ? `x[(x${b} + at) / 4u + ${q}u]` : quadOf(v, q, (e) => `x[x${b} + at + ${e}u]`);
  return `    for (var i = lane; i < (chunk_end - chunk) * ${turnPositions}u; i += ${threads}u) {
      let at = (chunk * ${turnPositions}u + i) * ${v}u;
${
    times(batch, (b) =>
      times(quads, (q) => `      inputs[i][${b * quads + q}u] = ${quad(b, q)}.zwxy;`))
  }
    }`;
}

/** The positions of a turn, in stages. */
function turn(kernel: PsumbookKernel): string {
  const { format: { m }, turnPositions, prefetch, stageBooks } = kernel;
  const books = turnPositions * m;
  const parts = prefetch
    ? [
      eachWord(kernel, (name) => `let w${name} = next${name};`),
      eachScale(kernel, (name) => `let scale${name} = vec4<f32>(next_scale${name});`),
    ]
    : [
      loadWords(kernel, "turn", (name) => `let w${name}`),
      loadScales(kernel, "turn", (name) => `let half${name}`),
      eachScale(kernel, (name) => `let scale${name} = vec4<f32>(half${name});`),
    ];
  const stages = Math.ceil(books / stageBooks / 2) * 2;
  for (let stage = 0; stage < stages; stage++) {
    const from = Math.min(stage * stageBooks, books);
    const count = Math.min(stageBooks, books - from);
    parts.push("{", fillStage(kernel, stage % 2, from, count), "}");
    if (stage === 0 && prefetch) {
      parts.push(
        "{ let next_turn = min(turn + 1u, end - 1u);",
        loadWords(kernel, "next_turn", (name) => `next${name}`),
        loadScales(kernel, "next_turn", (name) => `next_scale${name}`),
        "}",
      );
    }
    parts.push("workgroupBarrier();");
    for (let book = from; book < from + count; book++) {
      parts.push(gather(kernel, stage % 2, book, book - from));
    }
  }
  return parts.join("\n");
}

/** Psumbooks `[from, from + count)` of the turn, each team's by rounds. */
function fillStage(kernel: PsumbookKernel, half: number, from: number, count: number): string {
  const { format: { m }, batch, teams } = kernel;
  const quads = positionQuads(kernel.format);
  // Of the first team; with more teams than codebooks, others are at positions further on.
  const positionOf = (round: number) => Math.floor((from + round * teams) / m);
  return times(Math.ceil(count / teams), (round) => {
    const position = positionOf(round);
    const known = round > 0 && positionOf(round - 1) === position;
    const load = known
      ? ""
      : times(batch, (b) =>
        times(quads, (q) =>
          `let a${position}_${b}_${q} = inputs[input + ${position}u][${b * quads + q}u];`));
    const codebook = teams > m ? 0 : (from + round * teams) % m / teams;
    const fill = fillEntries(kernel, `books[${half}][${round}]`, codebook, position);
    const left = count - round * teams;
    return left < teams ? `if (team < ${left}u) {\n${load}\n${fill}\n}` : `${load}\n{\n${fill}\n}`;
  });
}

/** A thread's entries of a Psumbook: the inner products of its centroids and the activations. */
function fillEntries(
  kernel: PsumbookKernel,
  book: string,
  codebook: number,
  position: number,
): string {
  const { format: { v }, batch } = kernel;
  const entries = threadEntries(kernel);
  const each = (make: (b: number, s: number) => string) =>
    times(batch, (b) => times(entries, (s) => make(b, s)));
  const long = v > FLOAT16_SUM;
  const parts = [
    each((b, s) => `var p${b}_${s} = vec2<f16>();${long ? ` var total${b}_${s} = 0.0;` : ""}`),
  ];
  const pairs = Math.ceil(v / 2);
  for (let pair = 0; pair < pairs; pair++) {
    const [quad, [low, high]] = [pair >> 1, pair % 2 === 0 ? ["xy", "zw"] : ["zw", "xy"]];
    parts.push(each((b, s) => {
      const [a, c] = [`a${position}_${b}_${quad}.${high}`, `c${codebook}_${s}_${quad}.${low}`];
      const p = `p${b}_${s}`;
      return pair % CHAIN === 0 ? `${p} = ${a} * ${c};` : `${p} = fma(${a}, ${c}, ${p});`;
    }));
    if (long && (pair % CHAIN === CHAIN - 1 || pair === pairs - 1)) {
      parts.push(each((b, s) => `total${b}_${s} += f32(p${b}_${s}.x + p${b}_${s}.y);`));
    }
  }
  const lanes = batchLanes(batch);
  parts.push(times(entries, (s) => {
    const sums = Array.from(
      { length: batch },
      (_, b) => long ? `f16(total${b}_${s})` : `p${b}_${s}.x + p${b}_${s}.y`,
    );
    const sum = sums.length === 1 ? sums[0] : `${lanes.type("f16")}(${sums.join(", ")})`;
    return `${book}[fill${s}] = ${sum};`;
  }));
  return parts.join("\n");
}

/** Adds the partial sums of a Psumbook's codes; a group's last one is followed by its scale. */
function gather(kernel: PsumbookKernel, half: number, book: number, place: number): string {
  const { format: { m }, order: { groupPositions }, rowsPerThread, batch, teams } = kernel;
  const lanes = batchLanes(batch);
  const [position, codebook] = [Math.floor(book / m), book % m];
  const opens = position % groupPositions === 0 && codebook === 0;
  const closes = (position + 1) % groupPositions === 0 && codebook === m - 1;
  const round = `books[${half}][${Math.floor(place / teams)}]`;
  return times(rowsPerThread, (r) => {
    const index = entryIndex(kernel, position, codebook, r, place % teams);
    const scale = scaleOf(kernel, position, r);
    const factor = batch === 1 ? scale : `${lanes.type("f32")}(${scale})`;
    return `sum${r} ${opens ? "=" : "+="} ${round}[${index}];` +
      (closes ? ` acc${r} = fma(${factor}, ${lanes.type("f32")}(sum${r}), acc${r});` : "");
  });
}

/** Where a code's entry stands in its round: the place of the team's Psumbook, and the code. */
function entryIndex(
  kernel: PsumbookKernel,
  position: number,
  codebook: number,
  r: number,
  team: number,
): string {
  const { format, packed } = kernel;
  const word = wordOf(kernel, position, codebook, r);
  const place = position % codesPerWord(format);
  const code = packed ? `dot4U8Packed(${word}, ${256 ** place}u)` : codeInWord(format, word, place);
  return team === 0 ? code : `${code} + ${team * 256}u`;
}

/** The code words of a turn, into what `target` names. */
function loadWords(
  kernel: PsumbookKernel,
  turn: string,
  target: (name: string) => string,
): string {
  const { format, turnPositions, order } = kernel;
  const lines = turnPositions / codesPerWord(format) * format.m;
  return eachWord(
    kernel,
    (name, line, t) =>
      `${target(name)} = codes[words${t} + (${turn} * ${lines}u + ${line}u) * ${
        order.rowBlock / 4
      }u];`,
  );
}

/** The scales of a turn, float16, into what `target` names. */
function loadScales(
  kernel: PsumbookKernel,
  turn: string,
  target: (name: string) => string,
): string {
  const { turnPositions, order } = kernel;
  return eachScale(
    kernel,
    (name, position, t) =>
      `${
        target(name)
      } = scales[scales${t} + (${turn} * ${turnPositions}u + ${position}u) / ${order.scalePositions}u * ${
        order.rowBlock / 4
      }u];`,
  );
}

/** Partial sums: `[split][row][n]`, padded rows of N included. */
function storePartial({ batch, rowsPerThread, threads }: PsumbookKernel): string {
  return times(batch, (b) =>
    times(
      rowsPerThread / 4,
      (t) =>
        `  if (first + ${b}u < rows && quad + ${t * threads}u + lane < quads) {
    let row = split * params.row_cap + first - params.row_base + ${b}u;
    y[row * params.partial_stride / 4u + quad${t}] = vec4<f32>(${
          [0, 1, 2, 3].map((r) => sumOf(batch, 4 * t + r, b)).join(", ")
        });
  }`,
    ));
}

/** Whole sums, where K is one split. */
function storeWhole({ batch, rowsPerThread, threads }: PsumbookKernel): string {
  return times(rowsPerThread, (r) =>
    `  {
    let n = (quad + ${(r >> 2) * threads}u + lane) * 4u + ${r & 3}u;
    if (n < params.n) {
${
      times(batch, (b) =>
        `      if (first + ${b}u < rows) { put(range_start() + first + ${b}u, n, ${
          sumOf(batch, r, b)
        }); }`)
    }
    }
  }`);
}

function sumOf(batch: number, r: number, b: number): string {
  return batch === 1 ? `acc${r}` : `acc${r}.${"xyzw"[b]}`;
}
