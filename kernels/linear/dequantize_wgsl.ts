/**
 * WGSL of the dequantizing decode kernel of 8-bit codes for GPUs: a code gathers its centroid, which
 * is multiplied with the activations in pairs along K, so that one float16 multiply-add makes two
 * products.
 *
 * The codebooks stand in workgroup memory several times, lanes spread over the copies, so that they
 * seldom meet in a bank. Threads of a workgroup share out rows of N and, for few rows of the step,
 * all splits of K: then their sums meet in workgroup memory and no partial sums go to memory.
 *
 * A thread gathers centroids for all its rows of N and goes with them through the rows of the step one
 * by one: little more than its sums stays in registers, and a load of activations serves all its rows
 * of N.
 *
 * Array indices that are not constant cost two instructions each, because WGSL's implementations
 * clamp them: so activations are arrays of a turn's, and a code becomes its index in one instruction
 * where there are packed dot products.
 *
 * @module
 */
import { codesPerWord } from "../../shared/model_config.ts";
import { fillTablesWgsl, gatherWgsl, tablesWgsl } from "./centroid_tables_wgsl.ts";
import type { DequantizeKernel } from "./dequantize_kernel.ts";
import { FLOAT16_PAIR_K } from "./order.ts";
import { type Output, outputWgsl } from "./output_wgsl.ts";
import { leaveWgsl, sumsWgsl } from "./share_sums_wgsl.ts";
import {
  eachScale,
  eachWord,
  loadScales,
  loadWords,
  scaleOf,
  threadRowsWgsl,
  threadTurnsWgsl,
} from "./thread_rows_wgsl.ts";
import { batchRowsWgsl, HEADER_WGSL, times } from "./wgsl.ts";
import { shareThreads, splitPositions } from "./workgroup_share.ts";

const OUTPUT_BINDING = 6;

/**
 * The kernel's code; dispatched over (columns of N, groups of splits, batches of rows).
 *
 * @param target where whole sums go: to an output, finished only where `holdsPairs` says so;
 * or to the scratch, as partial ones do
 */
export function dequantizeKernelWgsl(
  kernel: DequantizeKernel,
  target: Output | "partial",
): string {
  const { order, batch, lanes, rowsPerThread } = kernel;
  const threads = shareThreads(kernel);
  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> codebooks: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read> scales: array<vec4<f16>>;
${
    target === "partial"
      ? `@group(0) @binding(${OUTPUT_BINDING}) var<storage, read_write> y: array<vec4<f32>>;`
      : outputWgsl(target, OUTPUT_BINDING)
  }
${declarations(kernel)}

// Where the activations of a row of this batch begin, in fours.
fn input_of(row: u32) -> u32 {
  return (params.x_offset + (range_start() + row) * params.x_stride) / 4u;
}

@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
${batchRowsWgsl(batch, (row) => `input_of(${row})`)}
${threadRowsWgsl(kernel, lanes, `lane % ${lanes}u`)}
${threadTurnsWgsl(kernel, order.dequantize.unitPositions)}
${firstWords(kernel)}
  let copy = lane & ${kernel.copies - 1}u;
${fillTablesWgsl(kernel, crosswise)}
${kernel.inputTurns > 0 ? "" : "  workgroupBarrier();"}
${times(rowsPerThread, (r) => times(batch, (b) => `  var acc${r}_${b} = 0.0;`))}
${
    kernel.inputTurns > 0 ? chunkedTurns(kernel) : `  for (var turn = 0u; turn < turns; turn++) {
${turn(kernel)}
  }`
  }
${leaveWgsl(kernel, target)}
}
`;
}

function declarations(kernel: DequantizeKernel): string {
  const { format: { v }, batch, splits, turnPositions, inputTurns } = kernel;
  const input = inputTurns > 0
    ? `// Activations of a turn of a split each, row by row.
var<workgroup> inputs: array<array<vec4<f16>, ${batch * turnPositions * v / 4}>, ${
      splits * inputTurns
    }>;`
    : "";
  return [tablesWgsl(kernel, "vec4<f16>"), input, sumsWgsl(kernel)].join("\n");
}

/**
 * The halves of a four change places in the tables. Loads of 8 and 16 bytes put halves into even and odd
 * registers by turns; crosswise, the two that are multiplied come from different banks of an NVIDIA
 * GPU's register file, and the sum never makes three of one.
 */
const crosswise = (centroid: string) => `${centroid}.zwxy`;

/** All turns, the activations of some of them at a time in workgroup memory. */
function chunkedTurns(kernel: DequantizeKernel): string {
  const { format: { v }, order, batch, splits, turnPositions, inputTurns, lanes } = kernel;
  const turnQuads = turnPositions * v / 4;
  const turnRows = batch * turnQuads;
  const splitTurns = splitPositions(order) / turnPositions;
  return `  for (var chunk = 0u; chunk < ${splitTurns}u; chunk += ${inputTurns}u) {
    if (chunk > 0u) { workgroupBarrier(); }
    for (var i = lane; i < ${splits * inputTurns * turnRows}u; i += ${shareThreads(kernel)}u) {
      let at = i % ${turnRows}u;
      let row = min(first + at / ${turnQuads}u, rows - 1u);
      let slot = i / ${turnRows}u;
      let turn = (workgroup.y * ${splits}u + slot / ${inputTurns}u) * ${splitTurns}u + chunk
        + slot % ${inputTurns}u;
      inputs[slot][at] = x[input_of(row) + turn * ${turnQuads}u + at % ${turnQuads}u];
    }
    workgroupBarrier();
    let slots = lane / ${lanes}u * ${inputTurns}u;
    for (var turn = chunk; turn < min(chunk + ${inputTurns}u, turns); turn++) {
      let slot = slots + turn - chunk;
${turn(kernel)}
    }
  }`;
}

/** What is loaded ahead of the first turn. */
function firstWords(kernel: DequantizeKernel): string {
  switch (kernel.prefetch) {
    case "none":
      return "";
    case "all":
      return loadWords(kernel, "position", (name) => `var next${name}`);
    case "over":
      return loadWords(kernel, "position", (name) => `var w${name}`) + "\n" +
        loadScales(kernel, "position", (name) => `var next_scale${name}`);
  }
}

/** Positions `[position, position + turnPositions)`. */
function turn(kernel: DequantizeKernel): string {
  const { format: { v }, order, turnPositions, inputTurns, prefetch } = kernel;
  const parts = prefetch === "none" ? [] : [
    `let next = select(position, position + ${turnPositions}u, turn + 1u < turns);`,
  ];
  switch (prefetch) {
    case "none":
      parts.push(loadWords(kernel, "position", (name) => `let w${name}`));
      break;
    case "all":
      parts.push(eachWord(kernel, (name) => `let w${name} = next${name};`));
      parts.push(loadWords(kernel, "next", (name) => `next${name}`));
      break;
  }
  if (prefetch === "over") {
    parts.push(eachScale(kernel, (name) => `let scale${name} = vec4<f32>(next_scale${name});`));
    parts.push(loadScales(kernel, "next", (name) => `next_scale${name}`));
  } else {
    parts.push(loadScales(kernel, "position", (name) => `let scale${name}`, "vec4<f32>"));
  }
  if (inputTurns === 0) parts.push(`let input_quad = position * ${v / 4}u;`);
  // Products of a group of positions are summed in float16; of a longer vector in pieces.
  const { groupPositions } = order.dequantize;
  const groupQuads = groupPositions * v / 4;
  const pairQuads = FLOAT16_PAIR_K / 4;
  for (let group = 0; group < turnPositions; group += groupPositions) {
    for (let quad = 0; quad < groupQuads; quad += pairQuads) {
      const first = group * v / 4 + quad;
      parts.push(pairs(kernel, first, Math.min(pairQuads, groupQuads - quad)));
    }
    if (prefetch === "over") {
      const perWord = codesPerWord(kernel.format);
      const [from, to] = [group, group + groupPositions].map((at) => Math.floor(at / perWord));
      parts.push(loadWords(kernel, "next", (name) => `w${name}`, from, to));
    }
  }
  parts.push(`position += ${turnPositions}u;`);
  return parts.join("\n");
}

/**
 * The products of `count` fours of K from the turn's `first` on: those of even K and those of odd K
 * summed in float16, then together and scaled in float32.
 */
function pairs(kernel: DequantizeKernel, first: number, count: number): string {
  const { format: { v }, batch, rowsPerThread, gatherQuads, inputTurns, turnPositions } = kernel;
  const turnQuads = turnPositions * v / 4;
  const input = (b: number, q: number) =>
    inputTurns > 0 ? `inputs[slot][${b * turnQuads + q}u]` : `x[x${b} + input_quad + ${q}u]`;
  const pieces = Math.ceil(count / gatherQuads);
  const pair = (r: number, b: number) => pieces > 1 ? `pair${r}_${b}` : `pair${r}`;
  const parts = ["{"];
  if (pieces > 1) {
    parts.push(times(rowsPerThread, (r) => times(batch, (b) => `var ${pair(r, b)}: vec2<f16>;`)));
  }
  for (let piece = 0; piece < pieces; piece++) {
    const from = first + piece * gatherQuads;
    const quads = Math.min(gatherQuads, count - piece * gatherQuads);
    parts.push(
      "{",
      times(rowsPerThread, (r) =>
        gatherWgsl(
          kernel,
          from,
          quads,
          r,
          (i, centroids) => `let c${r}_${i} = ${centroids.join(" + ")};`,
        )),
    );
    for (let b = 0; b < batch; b++) {
      parts.push("{", times(quads, (i) => `let a${i} = ${input(b, from + i)};`));
      // Neighbouring products share an activation: its register need not be read twice.
      for (let i = 0; i < quads; i++) {
        parts.push(times(rowsPerThread, (r) => {
          const opens = piece === 0 && i === 0;
          return opens
            ? `${pieces > 1 ? "" : "var "}${pair(r, b)} = a0.xy * c${r}_0.zw;`
            : `${pair(r, b)} = fma(a${i}.xy, c${r}_${i}.zw, ${pair(r, b)});`;
        }));
        parts.push(
          times(
            rowsPerThread,
            (r) => `${pair(r, b)} = fma(a${i}.zw, c${r}_${i}.xy, ${pair(r, b)});`,
          ),
        );
      }
      if (piece === pieces - 1) {
        const scale = (r: number) => scaleOf(kernel, Math.floor(first / (v / 4)), r);
        parts.push(
          times(
            rowsPerThread,
            (r) =>
              `acc${r}_${b} = fma(${scale(r)}, f32(${pair(r, b)}.x) + f32(${
                pair(r, b)
              }.y), acc${r}_${b});`,
          ),
        );
      }
      parts.push("}");
    }
    parts.push("}");
  }
  parts.push("}");
  return parts.join("\n");
}
