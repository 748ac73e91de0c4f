/**
 * WGSL of the decode kernel of the `int8` family: a code gathers its centroid, four integers a word,
 * and a dot product adds its products with four activations to an integer.
 *
 * Activations of few rows are rounded by each workgroup itself, in three steps with a barrier behind
 * each: the largest magnitude of every 16 K, by the thread that holds them; that of their group; the
 * integers and the group's scale. Those of more rows come rounded (`int8_rows.ts`). `int8.ts` says
 * what they are rounded to. The products of a group are summed exactly, then scaled by both scales and
 * added in float32, groups of a split by rising K.
 *
 * Where threads stand, and how sums leave, is the dequantizing kernel's; so is the order of splits.
 *
 * @module
 */
import { codesPerWord } from "../../shared/model_config.ts";
import { fillTablesWgsl, gatherWgsl, tablesWgsl } from "./centroid_tables_wgsl.ts";
import { int8Sum, int8Wgsl } from "./int8.ts";
import { inputWords, type Int8Kernel, splitTurns } from "./int8_kernel.ts";
import { familyOrder, INT8_WORD_K } from "./order.ts";
import { type Output, outputWgsl } from "./output_wgsl.ts";
import { leaveWgsl, sumsWgsl } from "./share_sums_wgsl.ts";
import {
  eachScale,
  loadScales,
  loadWords,
  scaleOf,
  threadRowsWgsl,
  threadTurnsWgsl,
} from "./thread_rows_wgsl.ts";
import { firstRowWgsl, HEADER_WGSL, times } from "./wgsl.ts";
import { shareThreads } from "./workgroup_share.ts";

const OUTPUT_BINDING = 6;

/**
 * The kernel's code; dispatched over (columns of N, groups of splits, batches of rows).
 *
 * @param members matrices of the stack
 * @param target where whole sums go, as for the dequantizing kernel
 */
export function int8KernelWgsl(
  kernel: Int8Kernel,
  members: number,
  target: Output | "partial",
): string {
  const { format: { m, v }, order, batch, lanes, rowsPerThread, copies } = kernel;
  const { unitPositions } = familyOrder(order, "int8");
  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<${kernel.rounded ? "vec4<u32>" : "vec4<f16>"}>;
@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> codebooks: array<u32>;
@group(0) @binding(5) var<storage, read> scales: array<vec4<f16>>;
${
    target === "partial"
      ? `@group(0) @binding(${OUTPUT_BINDING}) var<storage, read_write> y: array<vec4<f32>>;`
      : outputWgsl(target, OUTPUT_BINDING)
  }
${
    kernel.rounded
      ? `@group(0) @binding(${OUTPUT_BINDING + 1}) var<storage, read> x_largest: array<f32>;`
      : ""
  }
${int8Wgsl(kernel.packed)}
${declarations(kernel)}

@compute @workgroup_size(${shareThreads(kernel)})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
${firstRowWgsl(batch)}
${threadRowsWgsl(kernel, lanes, `lane % ${lanes}u`)}
${threadTurnsWgsl(kernel, unitPositions)}
${
    kernel.prefetch
      ? loadWords(kernel, "position", (name) => `var w${name}`) + "\n" +
        loadScales(kernel, "position", (name) => `var next_scale${name}`)
      : ""
  }
  let copy = lane & ${copies - 1}u;
${fillTablesWgsl(kernel)}
  let book_scale = bitcast<f32>(codebooks[${members * m * 256 * v / 4}u + book]);
${times(rowsPerThread, (r) => times(batch, (b) => `  var acc${r}_${b} = 0.0;`))}
  for (var chunk = 0u; chunk < ${splitTurns(kernel)}u; chunk += ${kernel.inputTurns}u) {
    if (chunk > 0u) { workgroupBarrier(); }
${kernel.rounded ? copyInputs(kernel) : roundInputs(kernel)}
    workgroupBarrier();
    let slots = lane / ${lanes}u * ${kernel.inputTurns}u;
    for (var turn = chunk; turn < min(chunk + ${kernel.inputTurns}u, turns); turn++) {
      let slot = slots + turn - chunk;
${turn(kernel)}
    }
  }
${leaveWgsl(kernel, target)}
}
`;
}

function declarations(kernel: Int8Kernel): string {
  const { batch, splits, inputTurns } = kernel;
  const slots = splits * inputTurns;
  return `${tablesWgsl(kernel, "u32")}
// Activations of a turn of a split each, row by row, and the scales of their groups.
var<workgroup> inputs: array<array<vec4<u32>, ${batch * inputWords(kernel).turn}>, ${slots}>;
var<workgroup> input_scales: array<array<f32, ${batch * turnGroups(kernel)}>, ${slots}>;
${sumsWgsl(kernel)}`;
}

const turnGroups = ({ turnPositions, groupPositions }: Int8Kernel) =>
  turnPositions / groupPositions;

/** The activations of the chunk's turns, as integers. */
function roundInputs(kernel: Int8Kernel): string {
  const { format: { v }, splits, batch, inputTurns, turnPositions, groupPositions } = kernel;
  const threads = shareThreads(kernel);
  const words = inputWords(kernel);
  const groupWords = groupPositions * v / INT8_WORD_K;
  const each = (body: (j: number) => string) => times(words.perThread, body);
  const mine = (j: number) =>
    (j + 1) * threads <= words.all ? "" : `if (lane + ${j * threads}u < ${words.all}u) `;
  return `${
    each((j) =>
      `    let item${j} = min(lane + ${j * threads}u, ${words.all - 1}u);
    let slot${j} = item${j} / ${batch * words.turn}u;
    let at${j} = item${j} % ${batch * words.turn}u;
    let row${j} = range_start() + min(first + at${j} / ${words.turn}u, rows - 1u);
    let from${j} = (params.x_offset + row${j} * params.x_stride) / 4u
      + ((workgroup.y * ${splits}u + slot${j} / ${inputTurns}u) * ${
        splitTurns(kernel)
      }u + chunk + slot${j} % ${inputTurns}u) * ${turnPositions * v / 4}u
      + at${j} % ${words.turn}u * 4u;
${times(4, (q) => `    let values${j}_${q} = x[from${j} + ${q}u];`)}
    let bits${j} = largest_int8(values${j}_0, values${j}_1, values${j}_2, values${j}_3);
    ${mine(j)}{ inputs[slot${j}][at${j}] = vec4<u32>(bits${j}, 0u, 0u, 0u); }`
    )
  }
    workgroupBarrier();
${
    each((j) =>
      `    let group${j} = at${j} - at${j} % ${groupWords}u;
    var most${j} = 0u;
${
        times(
          groupWords,
          (i) => `    most${j} = max(most${j}, inputs[slot${j}][group${j} + ${i}u].x);`,
        )
      }
    let largest${j} = bitcast<f32>(most${j});
    let inverse${j} = inverse_int8(largest${j});`
    )
  }
    workgroupBarrier();
${
    each((j) =>
      `    ${mine(j)}{
      inputs[slot${j}][at${j}] = vec4<u32>(${
        [0, 1, 2, 3].map((q) => `pack_int8(vec4<f32>(values${j}_${q}) * inverse${j})`).join(", ")
      });
      if (at${j} == group${j}) {
        input_scales[slot${j}][at${j} / ${groupWords}u] = largest${j} * book_scale;
      }
    }`
    )
  }`;
}

/** The activations of the chunk's turns, which are integers, and the scales of their groups. */
function copyInputs(kernel: Int8Kernel): string {
  const { splits, batch, inputTurns } = kernel;
  const copy = (perTurn: number, body: (slot: string, place: string, from: string) => string) =>
    `    for (var i = lane; i < ${splits * inputTurns * batch * perTurn}u; i += ${
      shareThreads(kernel)
    }u) {
      let slot = i / ${batch * perTurn}u;
      let place = i % ${batch * perTurn}u;
      let row = range_start() + min(first + place / ${perTurn}u, rows - 1u);
      let turn = (workgroup.y * ${splits}u + slot / ${inputTurns}u) * ${splitTurns(kernel)}u + chunk
        + slot % ${inputTurns}u;
      ${body("slot", "place", `turn * ${perTurn}u + place % ${perTurn}u`)}
    }`;
  const words = inputWords(kernel).turn;
  const groups = turnGroups(kernel);
  const perRow = (perTurn: number) =>
    `row * (params.k / ${kernel.turnPositions * kernel.format.v}u * ${perTurn}u)`;
  return `${
    copy(words, (slot, place, from) => `inputs[${slot}][${place}] = x[${perRow(words)} + ${from}];`)
  }
${
    copy(groups, (slot, place, from) =>
      `input_scales[${slot}][${place}] = x_largest[${perRow(groups)} + ${from}] * book_scale;`)
  }`;
}

/** Positions `[position, position + turnPositions)`. */
function turn(kernel: Int8Kernel): string {
  const { format, turnPositions, groupPositions, prefetch } = kernel;
  const perWord = codesPerWord(format);
  const parts = prefetch
    ? [
      `let next = select(position, position + ${turnPositions}u, turn + 1u < turns);`,
      eachScale(kernel, (name) => `let scale${name} = vec4<f32>(next_scale${name});`),
      loadScales(kernel, "next", (name) => `next_scale${name}`),
    ]
    : [
      loadWords(kernel, "position", (name) => `let w${name}`),
      loadScales(kernel, "position", (name) => `let scale${name}`, "vec4<f32>"),
    ];
  for (let group = 0; group < turnPositions; group += groupPositions) {
    parts.push(groupProducts(kernel, group));
    if (!prefetch) continue;
    const [from, to] = [group, group + groupPositions].map((at) => Math.floor(at / perWord));
    parts.push(loadWords(kernel, "next", (name) => `w${name}`, from, to));
  }
  parts.push(`position += ${turnPositions}u;`);
  return parts.join("\n");
}

/** The products of a group from position `group` of the turn on. */
function groupProducts(kernel: Int8Kernel, group: number): string {
  const { format: { m, v }, batch, rowsPerThread, groupPositions, gatherQuads } = kernel;
  const first = group * v / 4;
  const groupQuads = groupPositions * v / 4;
  const { start, toFloat } = int8Sum(m * groupPositions * v);
  const turnWords = inputWords(kernel).turn;
  const pieces = Math.ceil(groupQuads / gatherQuads);
  const sum = (r: number, b: number) => pieces > 1 ? `sum${r}_${b}` : `sum${r}`;
  const parts = ["{"];
  if (pieces > 1) {
    parts.push(times(rowsPerThread, (r) => times(batch, (b) => `var ${sum(r, b)} = ${start};`)));
  }
  for (let piece = 0; piece < pieces; piece++) {
    const from = first + piece * gatherQuads;
    const quads = Math.min(gatherQuads, groupQuads - piece * gatherQuads);
    parts.push(
      "{",
      times(rowsPerThread, (r) =>
        gatherWgsl(
          kernel,
          from,
          quads,
          r,
          (i, centroids) => times(m, (k) => `let c${r}_${i}_${k} = ${centroids[k]};`),
        )),
    );
    for (let b = 0; b < batch; b++) {
      parts.push("{");
      if (pieces === 1) parts.push(times(rowsPerThread, (r) => `var ${sum(r, b)} = ${start};`));
      parts.push(
        times(quads / 4, (w) => `let a${w} = inputs[slot][${b * turnWords + from / 4 + w}u];`),
      );
      for (let i = 0; i < quads; i++) {
        for (let k = 0; k < m; k++) {
          parts.push(
            times(
              rowsPerThread,
              (r) =>
                `${sum(r, b)} = dot_int8(c${r}_${i}_${k}, a${i >> 2}.${"xyzw"[i & 3]}) + ${
                  sum(r, b)
                };`,
            ),
          );
        }
      }
      if (piece === pieces - 1) {
        const at = b * turnGroups(kernel) + group / groupPositions;
        parts.push(
          `let input_scale = input_scales[slot][${at}u];`,
          times(
            rowsPerThread,
            (r) =>
              `acc${r}_${b} = fma(${scaleOf(kernel, group, r)} * input_scale, ${
                toFloat(sum(r, b))
              }, acc${r}_${b});`,
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
