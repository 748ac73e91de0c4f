/**
 * WGSL of the prefill kernels: a tile of weights (dequantized, for CodeGEMM) and a tile of
 * activations in workgroup memory, multiplied with a patch of outputs in each thread's registers.
 * What the next tile needs of memory is under way while a tile is computed.
 *
 * In workgroup memory, what a thread multiplies stands together, an array for each: then one index is
 * checked and all else are constants.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import { codeWeights } from "./prefill_code_wgsl.ts";
import { denseWeights } from "./prefill_dense_wgsl.ts";
import {
  eachOutput,
  type PrefillFrame,
  type PrefillKernel,
  rowPlace,
  viewRow,
} from "./prefill_frame.ts";
import type { RowSource, TileCopy, TileLoad, WeightSource } from "./prefill_frame.ts";
import { int8RowSource, int8Weights } from "./prefill_int8_wgsl.ts";
import {
  type PrefillCode,
  prefillThreads,
  threadGrid,
  threadPlace,
  tileK,
  tilePieces,
} from "./prefill_tile.ts";
import { HEADER_WGSL, putWgsl, times } from "./wgsl.ts";

/** The kernel's code; dispatched over (tiles of N, tiles of rows, splits of K). */
export function prefillWgsl(kernel: PrefillKernel): string {
  const { tile, code, store, unroll, splits } = kernel;
  const threads = prefillThreads(tile);
  const grid = threadGrid(tile);
  const k = tileK(tile, code);
  invariant(splits.splits === 1 || splits.splitK % k.depth === 0, "tiles share out a split of K");
  const tail = kernel.k % k.depth !== 0;
  const pieces = tilePieces(tile, code);
  const buffers = unroll ? tile.buffers ?? 1 : 1;
  const frame: PrefillFrame = { kernel, k, pieces, buffers, threadColumns: grid.columns, tail };
  const { rows, weights } = sources(frame, code);

  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<${rows.type}>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
${weights.declarations}
${splits.splits === 1 ? putWgsl(store) : PUT_PARTIAL_WGSL}
// [buffer][thread along the rows][row of its patch][K / ${pieces.k}], and the same of columns
var<workgroup> tile_x: array<array<${pieces.type}, ${pieces.threadRows}>, ${buffers * grid.rows}>;
var<workgroup> tile_w: array<array<${pieces.type}, ${pieces.threadColumns}>, ${
    buffers * grid.columns
  }>;

${rows.declarations}

@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let column0 = workgroup.x * ${tile.columns}u;
  let row0 = workgroup.y * ${tile.rows}u;
  let rows = min(range_rows() - params.row_base, params.row_cap);
  let first_row = range_start() + params.row_base;
  let k_start = ${splits.splits === 1 ? "0u" : `workgroup.z * ${splits.splitK}u`};
  let k_end = ${splits.splits === 1 ? "params.k" : `min(k_start + ${splits.splitK}u, params.k)`};
  if (row0 >= rows) { return; }
${threadPlace(tile)}
  let busy = row0 + ty * ${tile.patchRows}u < rows;
${eachOutput(tile, (r, c) => `  var acc${r}_${c} = 0.0;`)}
${weights.prologue}
${unroll ? straightLoop(frame, rows, weights) : rolledLoop(frame, rows, weights)}
${
    times(tile.patchRows, (r) =>
      `  if (row0 + ty * ${tile.patchRows}u + ${r}u < rows) {
    let row = ${
        splits.splits === 1 ? "first_row" : "workgroup.z * params.row_cap"
      } + row0 + ty * ${tile.patchRows}u + ${r}u;
${
        times(tile.patchColumns, (c) =>
          `    if (column0 + tx + ${c * grid.columns}u < params.n) { put(row, column0 + tx + ${
            c * grid.columns
          }u, acc${r}_${c}); }`)
      }
  }`)
  }
}
`;
}

/** What a kernel multiplies. */
function sources(
  frame: PrefillFrame,
  code: PrefillCode | null,
): { rows: RowSource; weights: WeightSource } {
  if (code?.int8Positions) return { rows: int8RowSource(frame), weights: int8Weights(frame, code) };
  const weights = code === null ? denseWeights(frame) : codeWeights(frame, code);
  return { rows: float16Rows(frame), weights };
}

/** `put` of a sum that is not whole yet. */
const PUT_PARTIAL_WGSL = /* wgsl */ `
fn put(row: u32, n: u32, value: f32) {
  y[row * params.partial_stride + n] = value;
}
`;

/** Activations in float16. */
function float16Rows(frame: PrefillFrame): RowSource {
  const { kernel: { tile, vectorInput }, k, pieces: { row, type } } = frame;
  const vectors = vectorInput && k.groupK % 4 === 0;
  return {
    type: vectors ? "vec4<f16>" : "f16",
    declarations: activationsWgsl(frame, vectors),
    copies: [{
      items: tile.rows * row,
      type,
      names: { item: "quad", start: "row", next: "next_x" },
      start: (i) => {
        const start = `params.x_offset + ${viewRow(`${i} / ${row}u`)} * params.x_stride`;
        return vectors ? `(${start}) / 4u` : start;
      },
      value: (i, start, at) => `activations(${start}, ${at}, ${i} % ${row}u)`,
      put: (i, value) => `${rowPlace(frame, i)} = ${value};`,
    }],
  };
}

/** `activations(row, k, q)`: quad `q` of the tile that begins at `k`, of the row whose input begins
 * at `row` (in elements of `x`); zeros past a group's end and past K. */
function activationsWgsl({ k, tail }: PrefillFrame, vectors: boolean): string {
  const head = "fn activations(row: u32, k: u32, q: u32) -> vec4<f16> {";
  if (vectors) {
    return `${head}
${tail ? "  if (k + 4u * q >= params.k) { return vec4<f16>(); }" : ""}
  return x[row + k / 4u + q];
}`;
  }
  return `${head}
  let e = q % ${k.groupQuads}u * 4u;
  let first = k + q / ${k.groupQuads}u * ${k.groupK}u;
  let end = min(first + ${k.groupK}u, params.k);
  var v = vec4<f16>();
${
    times(4, (i) =>
      `  if (first + e + ${i}u < end) { v.${"xyzw"[i]} = x[row + first + e + ${i}u]; }`)
  }
  return v;
}`;
}

/** One tile after the other, everything in loops: little code, which a CPU compiles sooner. */
function rolledLoop(frame: PrefillFrame, rows: RowSource, weights: WeightSource): string {
  const { kernel: { tile }, k } = frame;
  const threads = prefillThreads(tile);
  const lets = (loads: TileLoad[]) =>
    loads.map(({ name, value }) => `let ${name} = ${value("k0")};`).join("\n");
  const copy = ({ items, start, value, put }: TileCopy) =>
    `    for (var i = lane; i < ${items}u; i += ${threads}u) {
      ${put("i", value("i", start("i"), "k0"))}
    }`;
  return `  let buffer_x = 0u;
  let buffer_y = 0u;
  for (var k0 = k_start; k0 < k_end; k0 += ${k.depth}u) {
    workgroupBarrier();
${[...rows.copies, ...weights.copies].map(copy).join("\n")}
    for (var i = lane; i < ${weights.items}u; i += ${threads}u) {
${lets(weights.load("i", ""))}
${weights.fill("i", "")}
    }
${lets(weights.own)}
    workgroupBarrier();
    if (busy) {
${weights.products}
    }
  }`;
}

/** An item that a thread takes of those that all threads share out among them. */
interface Slot {
  slot: string;
  /** Its name, and what it is. */
  i: string;
  at: string;
  whole: boolean;
  within: string;
}

/** The items of a thread. */
function itemSlots(items: number, threads: number, name: string): Slot[] {
  return Array.from({ length: Math.ceil(items / threads) }, (_, j) => ({
    slot: `_${j}`,
    i: `${name}_${j}`,
    // Where items run out, the last one is loaded by many and stored by none of them.
    at: (j + 1) * threads <= items
      ? `lane + ${j * threads}u`
      : `min(lane + ${j * threads}u, ${items - 1}u)`,
    whole: (j + 1) * threads <= items,
    within: `lane + ${j * threads}u < ${items}u`,
  }));
}

/** Straight code; the next tile's loads are under way while this one is computed. */
function straightLoop(frame: PrefillFrame, rows: RowSource, weights: WeightSource): string {
  const { kernel: { tile }, k, buffers } = frame;
  const threads = prefillThreads(tile);
  const grid = threadGrid(tile);
  const weightSlots = itemSlots(weights.items, threads, "item");
  const copySlots = [...rows.copies, ...weights.copies].flatMap((copy) =>
    itemSlots(copy.items, threads, copy.names.item).map((slot) => ({
      ...slot,
      copy,
      start: copy.names.start + slot.slot,
      next: copy.names.next + slot.slot,
    }))
  );
  const loads: TileLoad[] = [
    ...weightSlots.flatMap(({ i, slot }) => weights.load(i, slot)),
    ...copySlots.map(({ copy, i, start, next }) => ({
      name: next,
      type: copy.type,
      value: (at: string) => copy.value(i, start, at),
    })),
    ...weights.own.map((load) => ({ ...load, name: `next_${load.name}` })),
  ];
  const guarded = (slot: Slot, body: string) =>
    slot.whole ? `{\n${body}\n}` : `if (${slot.within}) {\n${body}\n}`;
  return `
${weightSlots.map(({ i, at }) => `  let ${i} = ${at};`).join("\n")}
${copySlots.map(({ i, at }) => `  let ${i} = ${at};`).join("\n")}
${copySlots.map(({ copy, start, i }) => `  let ${start} = ${copy.start(i)};`).join("\n")}
${loads.map(({ name, type, value }) => `  var ${name}: ${type} = ${value("k_start")};`).join("\n")}
${buffers === 2 ? "  var buffer = 0u;" : ""}
  let last = (k_end - 1u) / ${k.depth}u * ${k.depth}u;
  for (var k0 = k_start; k0 < k_end; k0 += ${k.depth}u) {
    let buffer_x = ${buffers === 2 ? `buffer * ${grid.columns}u` : "0u"};
    let buffer_y = ${buffers === 2 ? `buffer * ${grid.rows}u` : "0u"};
${weightSlots.map((slot) => guarded(slot, weights.fill(slot.i, slot.slot))).join("\n")}
${copySlots.map((slot) => guarded(slot, slot.copy.put(slot.i, slot.next))).join("\n")}
${weights.own.map(({ name }) => `    let ${name} = next_${name};`).join("\n")}
    workgroupBarrier();
    let k1 = min(k0 + ${k.depth}u, last);
${loads.map(({ name, value }) => `    ${name} = ${value("k1")};`).join("\n")}
    if (busy) {
${weights.products}
    }
${buffers === 2 ? "    buffer ^= 1u;" : "    workgroupBarrier();"}
  }`;
}
