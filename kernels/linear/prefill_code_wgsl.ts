/**
 * What prefill kernels of CodeGEMM matrices do their own way: weights from centroids, products in
 * float16.
 *
 * An output sums, over each group of K ({@linkcode prefillGroupK}) and each 16 K of it, the products
 * of even and of odd K in a float16 chain each; the sum of both is scaled and added in float32, by
 * rising K. A weight is its centroid as it stands, several centroids added in float16: the scale comes
 * with the sum, which rounds once less and costs nothing. (`magnitude.ts` keeps them from overflowing.)
 *
 * @module
 */
import { codesPerWord } from "../../shared/model_config.ts";
import {
  centroidCount,
  codeIndex,
  codeWidth,
  OCTET,
  OCTET_WEIGHTS,
  octetQuad,
} from "./code_words_wgsl.ts";
import {
  chainQuads,
  itemPositions,
  type PrefillCode,
  prefillThreads,
  tableCopies,
} from "./prefill_tile.ts";
import {
  eachOutput,
  type PrefillFrame,
  type TileLoad,
  type WeightSource,
} from "./prefill_frame.ts";
import { times } from "./wgsl.ts";

/** The weights and products of a CodeGEMM kernel in float16. */
export function codeWeights(frame: PrefillFrame, code: PrefillCode): WeightSource {
  const { kernel: { tile, unroll } } = frame;
  const positions = itemPositions(code);
  const source = positions === null
    ? singleWeights(frame, code)
    : wholeCodes(frame, code, positions);
  return {
    ...source,
    declarations: `${CODES_WGSL}
${source.declarations}`,
    prologue: `${codePlaces(code)}
${source.prologue}
${eachOutput(tile, (r, c) => `  var sum${r}_${c} = vec2<f16>();`)}`,
    copies: [],
    own: unroll ? scaleLoads(frame, code) : [],
    products: unroll ? straightProducts(frame, code) : rolledProducts(frame, code),
  };
}

type Source = Pick<WeightSource, "declarations" | "prologue" | "items" | "load" | "fill">;

/** Bindings of code words and scales. */
export const CODES_WGSL = `@group(0) @binding(4) var<storage, read> codes: array<u32>;
@group(0) @binding(6) var<storage, read> scales: array<f16>;`;

/** WGSL that declares where a workgroup's columns have their codes, centroids and scales. */
export function codePlaces({ format, order: { rowBlock } }: PrefillCode): string {
  const { m, v, g } = format;
  return `  let row_block = column0 / ${rowBlock}u;
  let in_block = column0 % ${rowBlock}u;
  let book = book_of(row_block) * ${m * centroidCount(format)}u;
  let block_words = params.k / ${codesPerWord(format) * v}u;
  let block_scales = params.k / ${g}u;`;
}

/** WGSL of an index that must stay below `count` past the end of K, where activations are zero. */
function within({ tail }: PrefillFrame, index: string, count: string): string {
  return tail ? `min(${index}, ${count} - 1u)` : index;
}

/** How a kernel takes centroids code by code; an item is what one load of code words gives a column. */
export interface CodeGather extends Omit<Source, "fill"> {
  /** Statements that declare `thread` of an item's column, and `at`, the item's first piece there. */
  place(i: string, pieces: number): string;
  /** Statements that find the centroids of an item, which {@linkcode quad} is made from. */
  find(slot: string): string;
  /** WGSL of four weights of the centroid that position `p` of an item has in codebook `c`. */
  quad(p: number, c: number, quad: number): string;
}

/**
 * Gathers from codebooks in workgroup memory, or in their storage buffer where there is no room.
 *
 * @param quadType of four weights of a codebook
 */
export function gatherCodes(
  frame: PrefillFrame,
  code: PrefillCode,
  positions: number,
  quadType: "vec4<f16>" | "u32",
): CodeGather {
  const { kernel: { tile, workgroupBytes, packedDot }, k, threadColumns } = frame;
  const { format, order: { rowBlock } } = code;
  const { m, v } = format;
  const perWord = codesPerWord(format);
  const entries = centroidCount(format);
  const copies = tableCopies(tile, code, workgroupBytes);
  const octets = copies === 0 && quadType === "vec4<f16>" && v % OCTET_WEIGHTS === 0;
  const column = (i: string) => `(${i} % ${tile.columns}u)`;
  const item = (i: string) => `${i} / ${tile.columns}u`;
  const loadCentroids = copies === 0 ? "" : `
  let copy = lane % ${copies}u;
  for (var i = lane; i < ${m * entries * copies}u; i += ${prefillThreads(tile)}u) {
    let entry = book + i / ${copies}u;
${times(v / 4, (q) => `    table[i][${q}] = codebooks[entry * ${v / 4}u + ${q}u];`)}
  }
  workgroupBarrier();`;
  const index = (c: number, position: number, slot: string) => {
    const word = `word${slot}_${c}`;
    if (positions === perWord) {
      return codeIndex(format, word, position, Math.max(1, copies), "copy", packedDot);
    }
    const shift = position === 0
      ? `shift${slot}`
      : `(shift${slot} + ${position * codeWidth(format)}u)`;
    const value = `(${word} >> ${shift}) & ${entries - 1}u`;
    return copies > 1 ? `((${value}) * ${copies}u + copy)` : `(${value})`;
  };
  return {
    declarations: `@group(0) @binding(5) var<storage, read> codebooks: array<${
      octets ? OCTET : quadType
    }>;
${
      copies === 0
        ? ""
        : `var<workgroup> table: array<array<${quadType}, ${v / 4}>, ${m * entries * copies}>;`
    }`,
    prologue: loadCentroids,
    items: k.depth / (positions * v) * tile.columns,
    load: (i, slot) => {
      const first = positions === 1 || positions === perWord
        ? item(i)
        : `${item(i)} * ${positions}u`;
      const position = (at: string) => `(${at} / ${v}u + ${first})`;
      const word = (at: string) =>
        within(
          frame,
          positions === perWord
            ? `(${item(i)} + ${at} / ${perWord * v}u)`
            : `${position(at)} / ${perWord}u`,
          "block_words",
        );
      const words: TileLoad[] = Array.from({ length: m }, (_, c) => ({
        name: `word${slot}_${c}`,
        type: "u32",
        value: (at) =>
          `codes[((row_block * block_words + ${
            word(at)
          }) * ${m}u + ${c}u) * ${rowBlock}u + in_block + ${column(i)}]`,
      }));
      const shift: TileLoad = {
        name: `shift${slot}`,
        type: "u32",
        value: (at) => `${position(at)} % ${perWord}u * ${codeWidth(format)}u`,
      };
      return positions === perWord ? words : [...words, shift];
    },
    place: (i, pieces) =>
      `let thread = buffer_x + ${column(i)} % ${threadColumns}u;
let at = ${column(i)} / ${threadColumns}u * ${frame.pieces.column}u + ${item(i)} * ${pieces}u;`,
    find: (slot) =>
      times(positions, (p) =>
        times(m, (c) => {
          const at = `${c * entries * Math.max(1, copies)}u + ${index(c, p, slot)}`;
          if (copies > 0) return `let code${p}_${c} = ${at};`;
          return octets
            ? times(
              v / OCTET_WEIGHTS,
              (o) =>
                `let octet${p}_${c}_${o} = codebooks[(book + ${at}) * ${
                  v / OCTET_WEIGHTS
                }u + ${o}u];`,
            )
            : `let code${p}_${c} = (book + ${at}) * ${v / 4}u;`;
        })),
    quad: (p, c, q) => {
      if (copies > 0) return `table[code${p}_${c}][${q}]`;
      return octets
        ? `vec4<f16>(${octetQuad(`octet${p}_${c}_${q >> 1}`, q & 1)})`
        : `codebooks[code${p}_${c} + ${q}u]`;
    },
  };
}

/** Weights code by code, those of several codebooks added. */
function wholeCodes(frame: PrefillFrame, code: PrefillCode, positions: number): Source {
  const { m, v } = code.format;
  const perCode = v / 4;
  const { place, find, quad, ...source } = gatherCodes(frame, code, positions, "vec4<f16>");
  const weights = (p: number, q: number) =>
    Array.from({ length: m }, (_, c) => quad(p, c, q)).join(" + ");
  return {
    ...source,
    fill: (i, slot) =>
      `${place(i, positions * perCode)}
${find(slot)}
${
        times(
          positions,
          (p) =>
            times(perCode, (q) => `tile_w[thread][at + ${p * perCode + q}u] = ${weights(p, q)};`),
        )
      }`,
  };
}

/** Weights one by one, for codes that do not fill quads: an item is a quad of a column. */
function singleWeights({ kernel: { tile }, k, threadColumns }: PrefillFrame, code: PrefillCode) {
  const { format, order: { rowBlock } } = code;
  const { m, v } = format;
  const perWord = codesPerWord(format);
  const entries = centroidCount(format);
  const source: Source = {
    declarations: `@group(0) @binding(5) var<storage, read> codebooks: array<f16>;

// Weight k of a column of the row block; \`book\` is where its first codebook begins.
fn weight(block: u32, column: u32, book: u32, k: u32) -> f16 {
  let position = k / ${v}u;
  let shift = position % ${perWord}u * ${codeWidth(format)}u;
  var sum = 0.0h;
  for (var c = 0u; c < ${m}u; c++) {
    let at = (block + position / ${perWord}u) * ${m}u + c;
    let code = (codes[at * ${rowBlock}u + column] >> shift) & ${entries - 1}u;
    sum += codebooks[(book + c * ${entries}u + code) * ${v}u + k % ${v}u];
  }
  return sum;
}`,
    prologue: "",
    items: k.quads * tile.columns,
    load: (i, slot) => [{
      name: `first${slot}`,
      type: "u32",
      value: (at) =>
        `${at} + ${i} / ${tile.columns}u / ${k.groupQuads}u * ${k.groupK}u + ` +
        `${i} / ${tile.columns}u % ${k.groupQuads}u * 4u`,
    }],
    fill: (i, slot) =>
      `let column = ${i} % ${tile.columns}u;
let quad = ${i} / ${tile.columns}u;
let live = ${k.groupK}u - quad % ${k.groupQuads}u * 4u;
let block = row_block * block_words;
var weights = vec4<f16>();
for (var e = 0u; e < min(live, 4u); e++) {
  if (first${slot} + e < params.k) { weights[e] = weight(block, in_block + column, book, first${slot} + e); }
}
tile_w[buffer_x + column % ${threadColumns}u][column / ${threadColumns}u * ${k.quads}u + quad] = weights;`,
  };
  return source;
}

/** WGSL of the scale that a column of the row block has at `at`. */
export function scaleAt(
  frame: PrefillFrame,
  { format: { g }, order }: PrefillCode,
  at: string,
  column: string,
): string {
  const line = within(frame, `(${at}) / ${g}u`, "block_scales");
  return `scales[(row_block * block_scales + ${line}) * ${order.rowBlock}u + ${column}]`;
}

/** WGSL of the scale that column `c` of a thread has at `at`. */
function scale(frame: PrefillFrame, code: PrefillCode, at: string, c: number): string {
  return scaleAt(frame, code, at, `in_block + tx + ${c * frame.threadColumns}u`);
}

/** The scale that a group of a tile takes, among those that the tile loads. */
function scaleOfGroup({ k }: PrefillFrame, { format: { g } }: PrefillCode, group: number): number {
  if (g % k.depth === 0) return 0;
  return k.depth % g === 0 ? Math.floor(group * k.groupK / g) : group;
}

function scaleLoads(frame: PrefillFrame, code: PrefillCode): TileLoad[] {
  const { k, kernel: { tile } } = frame;
  const firstGroups = new Map<number, number>();
  for (let group = k.groups - 1; group >= 0; group--) {
    firstGroups.set(scaleOfGroup(frame, code, group), group);
  }
  return [...firstGroups].flatMap(([of, group]) =>
    Array.from({ length: tile.patchColumns }, (_, c) => ({
      name: `scale${of}_${c}`,
      type: "f16",
      value: (at: string) => scale(frame, code, `${at} + ${group * k.groupK}u`, c),
    }))
  );
}

function straightProducts(frame: PrefillFrame, code: PrefillCode): string {
  const { k } = frame;
  return times(k.groups, (group) =>
    groupProducts(
      frame,
      (quad) => `${group * k.groupQuads + quad}u`,
      (c) => `f32(scale${scaleOfGroup(frame, code, group)}_${c})`,
    ));
}

function rolledProducts(frame: PrefillFrame, code: PrefillCode): string {
  const { k, kernel: { tile } } = frame;
  return `for (var group = 0u; group < ${k.groups}u; group++) {
let quads = group * ${k.groupQuads}u;
${
    times(tile.patchColumns, (c) =>
      `let scale${c} = f32(${scale(frame, code, `k0 + group * ${k.groupK}u`, c)});`)
  }
${groupProducts(frame, (quad) => `quads + ${quad}u`, (c) => `scale${c}`)}
}`;
}

/** Products of a group: two quads at a time, as a thread reads 16 bytes best. */
function groupProducts(
  { kernel: { tile }, k }: PrefillFrame,
  quadAt: (quad: number) => string,
  scaleOf: (c: number) => string,
): string {
  let first = 0;
  return chainQuads(k).map((length) => {
    const lines: string[] = [];
    for (let pair = 0; pair < length; pair += 2) {
      const halves = Array.from({ length: Math.min(2, length - pair) }, (_, h) => pair + h);
      const reads = (name: string, from: string, count: number) =>
        times(
          count,
          (n) =>
            halves.map((q) =>
              `let ${name}${n}_${q} = ${from}[${n * k.quads}u + ${quadAt(first + q)}];`
            ).join("\n"),
        );
      lines.push(
        "{",
        reads("a", "tile_x[buffer_y + ty]", tile.patchRows),
        reads("b", "tile_w[buffer_x + tx]", tile.patchColumns),
        ...halves.flatMap((q) => [
          eachOutput(
            tile,
            (r, c) =>
              q === 0
                ? `sum${r}_${c} = a${r}_${q}.xy * b${c}_${q}.xy;`
                : `sum${r}_${c} = fma(a${r}_${q}.xy, b${c}_${q}.xy, sum${r}_${c});`,
          ),
          eachOutput(
            tile,
            (r, c) => `sum${r}_${c} = fma(a${r}_${q}.zw, b${c}_${q}.zw, sum${r}_${c});`,
          ),
        ]),
        "}",
      );
    }
    lines.push(
      eachOutput(
        tile,
        (r, c) =>
          `acc${r}_${c} = fma(${scaleOf(c)}, f32(sum${r}_${c}.x + sum${r}_${c}.y), acc${r}_${c});`,
      ),
    );
    first += length;
    return lines.join("\n");
  }).join("\n");
}
