/**
 * WGSL of the prefill kernels: a tile of weights (dequantized, for CodeGEMM) and a tile of
 * activations in workgroup memory, multiplied with a patch of outputs in each thread's registers.
 *
 * Whatever the tile: an output of a dense matrix is one chain of float32 multiply-adds by rising K;
 * of a CodeGEMM matrix, float16 sums of up to 16 consecutive K are added in float32. Dequantized
 * weights are rounded to float16, as implementations that dequantize whole matrices do.
 *
 * @module
 */
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";
import type { LinearStore } from "../kernel.ts";
import {
  centroidCount,
  codeInWord,
  codeWidth,
  OCTET,
  OCTET_WEIGHTS,
  octetQuad,
} from "./code_words_wgsl.ts";
import type { CodeOrder } from "./order.ts";
import { DENSE_K_ALIGN, DENSE_OCTET, DENSE_ROW_BLOCK, gcd } from "./order.ts";
import { HEADER_WGSL, putWgsl, spread, times } from "./wgsl.ts";

/** The tile of outputs of a workgroup. None of this changes a bit of the result. */
export interface PrefillTile {
  /** Rows of the step, and rows of N, that a workgroup computes. */
  rows: number;
  columns: number;
  /** Rows and columns of one thread's patch. */
  patchRows: number;
  patchColumns: number;
}

/** What a prefill kernel is generated from; `code` is null for dense. */
export interface PrefillKernel {
  tile: PrefillTile;
  code: { format: CodeGemmFormat; order: CodeOrder } | null;
  /** K is a multiple of 4, and input rows begin at one: the input is bound as vectors of 4. */
  vectorInput: boolean;
  /** Straight code where the tiles are loaded. */
  unroll: boolean;
  /** Workgroup memory that may be used. */
  workgroupBytes: number;
  store: LinearStore;
}

/** Threads of a prefill workgroup. */
export function prefillThreads(tile: PrefillTile): number {
  return (tile.rows / tile.patchRows) * (tile.columns / tile.patchColumns);
}

/** Workgroup memory of a prefill kernel. */
export function prefillBytes({ tile, code }: Pick<PrefillKernel, "tile" | "code">): number {
  return Math.ceil(tileK(code) / 4) * 4 * (tile.rows + tile.columns) * 2;
}

/** K of a tile: around 32; whole code words, or one position where vectors are long. */
export function tileK(code: Pick<NonNullable<PrefillKernel["code"]>, "format"> | null): number {
  if (code === null) return DENSE_K_ALIGN;
  const { v } = code.format;
  const wordK = codesPerWord(code.format) * v;
  return v > LONG_VECTOR ? v : Math.max(1, Math.floor(32 / wordK)) * wordK;
}

/** Above it, the vectors of a code word are too much for a tile. */
const LONG_VECTOR = 8;

/** The kernel's code; dispatched over (tiles of N, tiles of rows). */
export function prefillWgsl(kernel: PrefillKernel): string {
  const { tile, store, unroll } = kernel;
  const threads = prefillThreads(tile);
  const threadColumns = tile.columns / tile.patchColumns;
  const depth = tileK(kernel.code);
  const quads = Math.ceil(depth / 4);
  const vectorInput = kernel.vectorInput && depth % 4 === 0;
  const weights = kernel.code === null
    ? denseTile(tile, threads, unroll)
    : codeTile(kernel, kernel.code, threads, depth);
  const half = kernel.code !== null;
  const lanes = half ? rowLanes(tile) : 1;
  const products = half
    ? halfProducts(tile, threadColumns, quads)
    : floatProducts(tile, threadColumns, quads);

  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<${vectorInput ? "vec4<f16>" : "f16"}>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
${weights.declarations}
${putWgsl(store)}
// ${half ? "[K][row / lanes]" : "[K / 4][row]"} and [K / 4][column]
var<workgroup> tile_x: array<${half ? `vec${lanes}` : "vec4"}<f16>, ${
    quads * 4 * tile.rows / (half ? lanes : 4)
  }>;
var<workgroup> tile_w: array<vec4<f16>, ${quads * tile.columns}>;

// Four activations of a row from k on; zero past the last row and K.
fn activations(row: u32, k: u32) -> vec4<f16> {
  var v = vec4<f16>(0.0h);
  if (row < range_rows()) {
    let at = params.x_offset + (range_start() + row) * params.x_stride + k;
${
    vectorInput ? "    if (k < params.k) { v = x[at / 4u]; }" : `    if (k + 3u < params.k) {
      v = vec4<f16>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
    } else {
      if (k < params.k) { v.x = x[at]; }
      if (k + 1u < params.k) { v.y = x[at + 1u]; }
      if (k + 2u < params.k) { v.z = x[at + 2u]; }
    }`
  }
  }
  return v;
}

@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let column0 = workgroup.x * ${tile.columns}u;
  let row0 = workgroup.y * ${tile.rows}u;
  let rows = range_rows();
  if (row0 >= rows) { return; }
  let tx = lane % ${threadColumns}u;
  let ty = lane / ${threadColumns}u;
  let busy = row0 + ty * ${tile.patchRows}u < rows;
${times(tile.patchRows, (r) => times(tile.patchColumns, (c) => `  var acc${r}_${c} = 0.0;`))}
${weights.prologue}
  for (var k0 = 0u; k0 < params.k; k0 += ${depth}u) {
    workgroupBarrier();
    ${half ? loadRowVectors(tile, threads, quads, unroll) : loadRows(tile, threads, quads, unroll)}
${weights.load}
    workgroupBarrier();
    if (busy) {
${products}
    }
  }
${
    times(tile.patchRows, (r) =>
      `  if (row0 + ty * ${tile.patchRows}u + ${r}u < rows) {
    let row = range_start() + row0 + ty * ${tile.patchRows}u + ${r}u;
${
        times(tile.patchColumns, (c) =>
          `    if (column0 + tx + ${c * threadColumns}u < params.n) { put(row, column0 + tx + ${
            c * threadColumns
          }u, acc${r}_${c}); }`)
      }
  }`)
  }
}
`;
}

/** The activations of a tile as vectors along K. */
function loadRows(tile: PrefillTile, threads: number, quads: number, unroll: boolean): string {
  return spread(
    quads * tile.rows,
    threads,
    unroll,
    `tile_x[(i % ${quads}u) * ${tile.rows}u + i / ${quads}u] =
        activations(row0 + i / ${quads}u, k0 + (i % ${quads}u) * 4u);`,
  );
}

/** Rows of the step in a vector of {@linkcode loadRowVectors}. */
function rowLanes(tile: PrefillTile): 2 | 4 {
  return tile.patchRows % 4 === 0 ? 4 : 2;
}

/** The activations of a tile as vectors of rows at one K. */
function loadRowVectors(
  tile: PrefillTile,
  threads: number,
  quads: number,
  unroll: boolean,
): string {
  const lanes = rowLanes(tile);
  const groups = tile.rows / lanes;
  return spread(
    quads * groups,
    threads,
    unroll,
    `let k = i / ${groups}u * 4u;
${
      times(lanes, (l) =>
        `let v${l} = activations(row0 + i % ${groups}u * ${lanes}u + ${l}u, k0 + k);`)
    }
let to = k * ${groups}u + i % ${groups}u;
${
      times(4, (e) => {
        const rows = Array.from({ length: lanes }, (_, l) => `v${l}.${"xyzw"[e]}`).join(", ");
        return `tile_x[to + ${e * groups}u] = vec${lanes}<f16>(${rows});`;
      })
    }`,
  );
}

const eachOutput = (tile: PrefillTile, body: (r: number, c: number) => string) =>
  times(tile.patchRows, (r) => times(tile.patchColumns, (c) => body(r, c)));

/** Products of the tile in float32, one chain. */
function floatProducts(tile: PrefillTile, threadColumns: number, quads: number): string {
  return `for (var q = 0u; q < ${quads}u; q++) {
${
    times(tile.patchRows, (r) =>
      `let a${r} = vec4<f32>(tile_x[q * ${tile.rows}u + ty * ${tile.patchRows}u + ${r}u]);`)
  }
${
    times(tile.patchColumns, (c) =>
      `let b${c} = vec4<f32>(tile_w[q * ${tile.columns}u + tx + ${c * threadColumns}u]);`)
  }
${
    times(4, (e) =>
      eachOutput(tile, (r, c) =>
        `acc${r}_${c} = fma(a${r}.${"xyzw"[e]}, b${c}.${"xyzw"[e]}, acc${r}_${c});`))
  }
}`;
}

/**
 * Products of the tile in float16, for two rows at a time: a chain over up to
 * {@linkcode HALF_SUM_QUADS} quads of K, which then goes into float32.
 */
function halfProducts(tile: PrefillTile, threadColumns: number, quads: number): string {
  const lanes = rowLanes(tile);
  const groups = tile.rows / lanes;
  const eachPair = (body: (pair: number, c: number) => string) =>
    times(tile.patchRows / 2, (p) => times(tile.patchColumns, (c) => body(p, c)));
  const pairOfRows = (p: number) =>
    lanes === 2 ? `a${p}` : `a${p >> 1}.${p % 2 === 0 ? "xy" : "zw"}`;
  const step = (i: number, first: string) =>
    `{
${
      times(
        tile.patchColumns,
        (c) =>
          `let b${c} = tile_w[(${first} + ${i}u) * ${tile.columns}u + tx + ${c * threadColumns}u];`,
      )
    }
${
      times(4, (e) =>
        `{ let at = ((${first} + ${i}u) * 4u + ${e}u) * ${groups}u + ty * ${
          tile.patchRows / lanes
        }u;\n` +
        times(tile.patchRows / lanes, (l) => `let a${l} = tile_x[at + ${l}u];`) + "\n" +
        eachPair((p, c) => {
          const weight = `vec2<f16>(b${c}.${"xyzw"[e]})`;
          return i === 0 && e === 0
            ? `sum${p}_${c} = ${pairOfRows(p)} * ${weight};`
            : `sum${p}_${c} = fma(${pairOfRows(p)}, ${weight}, sum${p}_${c});`;
        }) + " }")
    }
}`;
  const group = (count: number, first: string) =>
    times(count, (i) => step(i, first)) + "\n" +
    eachPair((p, c) =>
      `acc${2 * p}_${c} += f32(sum${p}_${c}.x); acc${2 * p + 1}_${c} += f32(sum${p}_${c}.y);`
    );
  const whole = Math.floor(quads / HALF_SUM_QUADS);
  const rest = quads % HALF_SUM_QUADS;
  return eachPair((p, c) => `var sum${p}_${c} = vec2<f16>();`) +
    (whole === 0 ? "" : `
for (var q = 0u; q < ${whole * HALF_SUM_QUADS}u; q += ${HALF_SUM_QUADS}u) {
${group(HALF_SUM_QUADS, "q")}
}`) +
    (rest === 0 ? "" : `\n${group(rest, `${whole * HALF_SUM_QUADS}u`)}`);
}

/** Quads of K that may be summed in float16 (DESIGN: 16 consecutive K). */
const HALF_SUM_QUADS = 4;

interface TileSource {
  declarations: string;
  prologue: string;
  load: string;
}

function denseTile(tile: PrefillTile, threads: number, unroll: boolean): TileSource {
  const octets = DENSE_K_ALIGN / DENSE_OCTET;
  return {
    declarations: `@group(0) @binding(4) var<storage, read> weights: array<vec4<u32>>;`,
    prologue: `  let octets = (params.k + ${DENSE_K_ALIGN - 1}u) / ${DENSE_K_ALIGN}u * ${octets}u;
  let row_block = column0 / ${DENSE_ROW_BLOCK}u * octets;`,
    load: spread(
      octets * tile.columns,
      threads,
      unroll,
      `let o = i / ${tile.columns}u;
      let column = i % ${tile.columns}u;
      let w = weights[(row_block + k0 / ${DENSE_OCTET}u + o) * ${DENSE_ROW_BLOCK}u + column0 % ${DENSE_ROW_BLOCK}u + column];
      tile_w[2u * o * ${tile.columns}u + column] = vec4<f16>(vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y)));
      tile_w[(2u * o + 1u) * ${tile.columns}u + column] = vec4<f16>(vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w)));`,
    ),
  };
}

function codeTile(
  kernel: PrefillKernel,
  { format, order }: { format: CodeGemmFormat; order: CodeOrder },
  threads: number,
  depth: number,
): TileSource {
  const { tile, unroll } = kernel;
  const { m, v } = format;
  const perWord = codesPerWord(format);
  const entries = centroidCount(format);
  // A tile holds whole words, or one position of a word.
  const positions = depth >= perWord * v ? perWord : 1;
  // Positions of a word that have one scale.
  const shared = gcd(positions, order.scalePositions);
  const items = depth / (positions * v);
  const quads = Math.ceil(positions * v / 4);
  const vectors = v % 4 === 0;
  // The codebooks stand in workgroup memory where there is room.
  const local = prefillBytes(kernel) + m * entries * v * 2 <= kernel.workgroupBytes;
  const octets = !local && v % OCTET_WEIGHTS === 0;
  const table = local ? "table" : "codebooks";
  const type = octets ? OCTET : vectors ? "vec4<f16>" : "f16";
  const tableSize = m * entries * (vectors ? v / 4 : v);
  const code = (k: number, position: number) => {
    const value = positions === perWord
      ? codeInWord(format, `word${k}`, position)
      : `((word${k} >> shift) & ${entries - 1}u)`;
    return `(${local ? "" : `book * ${m * entries}u + `}${k * entries}u + ${value})`;
  };
  const sum = (load: (k: number) => string) =>
    `(${Array.from({ length: m }, (_, k) => load(k)).join(" + ")})`;
  const element = (at: number) => {
    const position = Math.floor(at / v);
    if (position >= positions) return "0.0";
    return `scale${position} * ` +
      sum((k) => `f32(${table}[${code(k, position)} * ${v}u + ${at % v}u])`);
  };
  const quadValue = (quad: number) => {
    const position = Math.floor(quad * 4 / v);
    if (octets) {
      return `scale${position} * ` + sum((k) => octetQuad(`octet${k}_${quad >> 1}`, quad & 1));
    }
    return vectors
      ? `scale${position} * ` +
        sum((k) => `vec4<f32>(${table}[${code(k, position)} * ${v / 4}u + ${(quad * 4 % v) / 4}u])`)
      : `vec4<f32>(${[0, 1, 2, 3].map((i) => element(quad * 4 + i)).join(", ")})`;
  };
  return {
    declarations: `@group(0) @binding(4) var<storage, read> codes: array<u32>;
@group(0) @binding(5) var<storage, read> codebooks: array<${type}>;
@group(0) @binding(6) var<storage, read> scales: array<f16>;
${local ? `var<workgroup> table: array<${type}, ${tableSize}>;` : ""}`,
    prologue: `let book = book_of(column0 / ${order.rowBlock}u);
${local ? spread(tableSize, threads, false, `table[i] = codebooks[book * ${tableSize}u + i];`) : ""}
  let word_count = params.k / ${perWord * v}u;
  let row_block = column0 / ${order.rowBlock}u;
  let in_block = column0 % ${order.rowBlock}u;
  let scale_block = row_block * (params.k / ${v * order.scalePositions}u);`,
    load: spread(
      items * tile.columns,
      threads,
      unroll,
      `let column = i % ${tile.columns}u;
      let item = i / ${tile.columns}u;
      let position = k0 / ${v}u + item * ${positions}u;
      let at = position / ${perWord}u;
      let to = item * ${quads * tile.columns}u + column;
      if (at < word_count) {
        let shift = ${codeWidth(format)}u * (position % ${perWord}u);
${
        times(m, (k) =>
          `        let word${k} = codes[((row_block * word_count + at) * ${m}u + ${k}u) * ${order.rowBlock}u + in_block + column];`)
      }
${
        times(positions, (p) =>
          p % shared === 0
            ? `        let scale${p} = f32(scales[(scale_block + (position + ${p}u) / ${order.scalePositions}u) * ${order.rowBlock}u + in_block + column]);`
            : `        let scale${p} = scale${p - p % shared};`)
      }
${
        times(octets ? quads / 2 : 0, (o) =>
          times(m, (k) => {
            const at = o * OCTET_WEIGHTS;
            const centroid = code(k, Math.floor(at / v));
            return `        let octet${k}_${o} = codebooks[${centroid} * ${v / OCTET_WEIGHTS}u + ${
              at % v / OCTET_WEIGHTS
            }u];`;
          }))
      }
${
        times(quads, (quad) =>
          `        tile_w[to + ${quad * tile.columns}u] = vec4<f16>(${quadValue(quad)});`)
      }
      } else {
        for (var q = 0u; q < ${quads}u; q++) { tile_w[to + q * ${tile.columns}u] = vec4<f16>(); }
      }`,
    ),
  };
}
