/**
 * WGSL of the decode kernels of CodeGEMM matrices: one thread holds a few rows of N, one workgroup a
 * row block and a split of K, for up to eight rows of the step at once.
 *
 * Both families share the skeleton (code words and scales of a unit are loaded into registers first,
 * everything is unrolled) and differ in what happens per code:
 *
 * - `codegemm` (arXiv 2512.17970): Psumbooks, the inner products of all 256 centroids with the
 *   activations at a position, are made in workgroup memory; a code gathers its partial sum.
 * - `dequantize`: a code gathers its centroid, which is multiplied with the activations.
 *
 * The order of one row's sum, which no batch size and no stage size changes: within a group of
 * positions in float16, by position, then by codebook; groups then with their scale in float32,
 * through a split of K; splits as `reduce_wgsl.ts` says.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import type { NumericsProfile } from "../../shared/protocol.ts";
import type { CodeOrder } from "./order.ts";
import type { Batch, BatchLanes, Target } from "./wgsl.ts";
import { batchLanes, HEADER_WGSL, putWgsl, spread, times } from "./wgsl.ts";

/** What a decode kernel of a CodeGEMM matrix is generated from. */
export interface CodeKernel {
  family: NumericsProfile["decode"];
  format: CodeGemmFormat;
  order: CodeOrder;
  /** Threads of a workgroup; `threads * rowsPerThread` is the order's row block. */
  threads: number;
  /** Rows of N a thread holds: 4 or 8. */
  rowsPerThread: number;
  batch: Batch;
  /** Workgroup memory that may be used. */
  workgroupBytes: number;
  target: Target;
}

/** Workgroup memory without which a kernel cannot be: one Psumbook, or the activations of a unit. */
export function codeKernelFits(kernel: CodeKernel): boolean {
  return kernel.family === "codegemm"
    ? psumbooksPerStage(kernel) >= 1
    : 2 * activationBytes(kernel) <= kernel.workgroupBytes;
}

/** The kernel's code. */
export function codeKernelWgsl(kernel: CodeKernel): string {
  const { format, order, threads, rowsPerThread, batch, target, family } = kernel;
  invariant(threads * rowsPerThread === order.rowBlock, "a workgroup covers a row block");
  invariant(codeKernelFits(kernel), "the kernel fits into workgroup memory");
  const lanes = batchLanes(batch);
  const quads = rowsPerThread / 4;
  const words = order.unitPositions / 4;
  const segments = order.unitPositions / order.segmentPositions;
  const rowQuads = order.rowBlock / 4;
  const body = family === "codegemm" ? psumbookBody(kernel, lanes) : dequantizeBody(kernel, lanes);

  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> x: array<f16>;
@group(0) @binding(3) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> codebooks: array<${centroidType(format.v)}>;
@group(0) @binding(5) var<storage, read> scales: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> y: array<${
    target === "partial" ? "vec4<f32>" : "f32"
  }>;
${body.declarations}
${target === "partial" ? "" : putWgsl(target)}

@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let block = workgroup.x;
  let split = workgroup.y;
  let rows = range_rows();
  let first = params.row_base + workgroup.z * ${batch}u;
  if (first >= rows) { return; }
${
    times(batch, (b) =>
      `  let x${b} = params.x_offset + min(first + ${b}u, rows - 1u) * params.x_stride;`)
  }
${
    times(rowsPerThread, (r) =>
      times(lanes.vectors, (j) => `  var acc${r}_${j} = ${lanes.type("f32")}(0.0);`))
  }
  let end = min((split + 1u) * params.split_units, params.units);
${body.prologue}
  for (var unit = split * params.split_units; unit < end; unit++) {
    let word_at = ((block * params.units + unit) * ${words * format.m}u) * ${rowQuads}u + lane;
${
    times(words, (q) =>
      times(format.m, (k) =>
        times(quads, (t) =>
          `    let w${q}_${k}_${t} = codes[word_at + ${
            (q * format.m + k) * rowQuads + t * threads
          }u];`)))
  }
    let scale_block = block * (params.units * ${order.unitPositions}u / ${order.scalePositions}u);
${
    times(segments, (s) =>
      `    let scale_at${s} = (scale_block + (unit * ${order.unitPositions}u + ${
        s * order.segmentPositions
      }u) / ${order.scalePositions}u) * ${rowQuads}u + lane;\n` +
      times(quads, (t) =>
        `    let scale${s}_${t} = vec4<f32>(scales[scale_at${s} + ${t * threads}u]);`))
  }
${body.unit}
  }
${target === "partial" ? storePartial(kernel, lanes) : storeDirect(kernel, lanes)}
}
`;
}

interface Body {
  declarations: string;
  prologue: string;
  unit: string;
}

/** Bytes of the Psumbooks of one position and codebook. */
function psumbookBytes(batch: Batch): number {
  return 256 * 2 * batch;
}

function activationBytes({ order, format, batch }: CodeKernel): number {
  return order.unitPositions * format.v * 2 * batch;
}

/** How many Psumbooks stand in workgroup memory at a time. */
function psumbooksPerStage(kernel: CodeKernel): number {
  const free = kernel.workgroupBytes - activationBytes(kernel);
  const all = kernel.order.unitPositions * kernel.format.m;
  return Math.min(all, Math.floor(free / psumbookBytes(kernel.batch)));
}

/** The activations of a unit, turned so that a vector holds all rows at one K. */
function loadActivations(kernel: CodeKernel, lanes: BatchLanes, base: string): string {
  const count = kernel.order.unitPositions * kernel.format.v;
  const body = times(lanes.vectors, (j) => {
    const loads = Array.from(
      { length: lanes.lanes },
      (_, l) => `x[x${j * lanes.lanes + l} + at]`,
    );
    return `activations${j}[${base}i] = ${lanes.type("f16")}(${loads.join(", ")});`;
  });
  return spread(count, kernel.threads, `let at = unit * ${count}u + i;\n${body}`);
}

function psumbookBody(kernel: CodeKernel, lanes: BatchLanes): Body {
  const { format: { m, v }, order, threads, rowsPerThread } = kernel;
  const stage = psumbooksPerStage(kernel);
  const entries = Array.from({ length: order.unitPositions * m }, (_, e) => ({
    position: Math.floor(e / m),
    codebook: e % m,
    slot: e % stage,
  }));
  const parts: string[] = [loadActivations(kernel, lanes, "")];
  for (let from = 0; from < entries.length; from += stage) {
    const staged = entries.slice(from, from + stage);
    // Before: the last stage's gathers are done, and the activations are there.
    parts.push("workgroupBarrier();");
    for (let k = 0; k < m; k++) {
      const own = staged.filter((entry) => entry.codebook === k);
      if (own.length === 0) continue;
      parts.push(
        spread(
          256,
          threads,
          loadCentroid(v, `${k * 256}u + i`) + own.map((entry) =>
            times(lanes.vectors, (j) => {
              const products = times(v, (e) => {
                const activation = `${lanes.type("f32")}(activations${j}[${
                  entry.position * v + e
                }])`;
                const centroid = splat(lanes, "f32", `c${e}`);
                return e === 0
                  ? `p = ${activation} * ${centroid};`
                  : `p = fma(${activation}, ${centroid}, p);`;
              });
              return `{ var p: ${lanes.type("f32")};\n${products}\n` +
                `book${j}[${entry.slot * 256}u + i] = ${lanes.type("f16")}(p); }`;
            })
          ).join("\n"),
        ),
      );
    }
    parts.push("workgroupBarrier();");
    for (const entry of staged) {
      const { position, codebook, slot } = entry;
      const opens = position % order.groupPositions === 0 && codebook === 0;
      const closes = (position + 1) % order.groupPositions === 0 && codebook === m - 1;
      for (let r = 0; r < rowsPerThread; r++) {
        const code = codeOf(position, codebook, r);
        parts.push(`{ let at = ${slot * 256}u + ${code};`);
        for (let j = 0; j < lanes.vectors; j++) {
          parts.push(`sum${r}_${j} ${opens ? "=" : "+="} book${j}[at];`);
          if (closes) parts.push(addGroup(order, lanes, position, r, j));
        }
        parts.push("}");
      }
    }
  }
  return {
    declarations: times(
      lanes.vectors,
      (j) =>
        `var<workgroup> book${j}: array<${lanes.type("f16")}, ${stage * 256}>;\n` +
        `var<workgroup> activations${j}: array<${lanes.type("f16")}, ${order.unitPositions * v}>;`,
    ),
    prologue: sumVariables(rowsPerThread, lanes),
    unit: parts.join("\n"),
  };
}

function dequantizeBody(kernel: CodeKernel, lanes: BatchLanes): Body {
  const { format: { m, v }, order, threads, rowsPerThread } = kernel;
  const count = order.unitPositions * v;
  const tableBytes = m * 256 * v * 2;
  const local = tableBytes + 2 * activationBytes(kernel) <= kernel.workgroupBytes;
  const vectors = v % 4 === 0 ? v / 4 : v;
  const table = local ? "table" : "codebooks";
  const parts: string[] = [
    `let half = (unit & 1u) * ${count}u;`,
    loadActivations(kernel, lanes, "half + "),
    // One barrier is enough: a half is written again only after everyone passed the next barrier.
    "workgroupBarrier();",
  ];
  for (let position = 0; position < order.unitPositions; position++) {
    for (let r = 0; r < rowsPerThread; r++) {
      parts.push("{");
      for (let k = 0; k < m; k++) {
        parts.push(`let at${k} = (${k * 256}u + ${codeOf(position, k, r)}) * ${vectors}u;`);
      }
      const opens = position % order.groupPositions === 0;
      const closes = (position + 1) % order.groupPositions === 0;
      for (let e = 0; e < v; e++) {
        const single = v % 4 !== 0;
        if (single || e % 4 === 0) {
          const at = single ? e : e / 4;
          const sum = Array.from({ length: m }, (_, k) => `${table}[at${k} + ${at}u]`).join(" + ");
          parts.push(`let c${at} = ${sum};`);
        }
        const centroid = single ? `c${e}` : `c${Math.floor(e / 4)}.${"xyzw"[e % 4]}`;
        // A vector longer than the float16 bound is closed in between.
        const first = (opens && e === 0) || (e > 0 && e % 16 === 0);
        const last = (closes && e === v - 1) || (e % 16 === 15 && e < v - 1);
        for (let j = 0; j < lanes.vectors; j++) {
          const activation = `activations${j}[half + ${position * v + e}u]`;
          const factor = splat(lanes, "f16", centroid);
          parts.push(
            first
              ? `sum${r}_${j} = ${activation} * ${factor};`
              : `sum${r}_${j} = fma(${activation}, ${factor}, sum${r}_${j});`,
          );
          if (last) parts.push(addGroup(order, lanes, position, r, j));
        }
      }
      parts.push("}");
    }
  }
  const type = centroidType(v);
  return {
    declarations: times(
      lanes.vectors,
      (j) => `var<workgroup> activations${j}: array<${lanes.type("f16")}, ${2 * count}>;`,
    ) + (local ? `\nvar<workgroup> table: array<${type}, ${m * 256 * vectors}>;` : ""),
    prologue: sumVariables(rowsPerThread, lanes) +
      (local ? "\n" + spread(m * 256 * vectors, threads, "table[i] = codebooks[i];") : ""),
    unit: parts.join("\n"),
  };
}

function sumVariables(rowsPerThread: number, lanes: BatchLanes): string {
  return times(
    rowsPerThread,
    (r) => times(lanes.vectors, (j) => `var sum${r}_${j} = ${lanes.type("f16")}(0.0);`),
  );
}

/** The group's float16 sum, scaled, onto the float32 accumulator. */
function addGroup(order: CodeOrder, lanes: BatchLanes, position: number, r: number, j: number) {
  const segment = Math.floor(position / order.segmentPositions);
  const scale = splat(lanes, "f32", `scale${segment}_${r >> 2}.${"xyzw"[r & 3]}`);
  return `acc${r}_${j} = fma(${scale}, ${lanes.type("f32")}(sum${r}_${j}), acc${r}_${j});`;
}

function codeOf(position: number, codebook: number, r: number): string {
  const word = `w${position >> 2}_${codebook}_${r >> 2}.${"xyzw"[r & 3]}`;
  const byte = position & 3;
  if (byte === 0) return `(${word} & 255u)`;
  return byte === 3 ? `(${word} >> 24u)` : `((${word} >> ${8 * byte}u) & 255u)`;
}

function centroidType(v: number): string {
  return v % 4 === 0 ? "vec4<f16>" : "f16";
}

/** Centroid `index` as float32 scalars c0, c1, ... */
function loadCentroid(v: number, index: string): string {
  if (v % 4 !== 0) {
    return times(v, (e) => `let c${e} = f32(codebooks[(${index}) * ${v}u + ${e}u]);`) + "\n";
  }
  return times(v / 4, (q) =>
    `let q${q} = vec4<f32>(codebooks[(${index}) * ${v / 4}u + ${q}u]);\n` +
    times(4, (e) => `let c${4 * q + e} = q${q}.${"xyzw"[e]};`)) + "\n";
}

function splat(lanes: BatchLanes, element: "f16" | "f32", scalar: string): string {
  return lanes.lanes === 1 ? scalar : `${lanes.type(element)}(${scalar})`;
}

/** Partial sums: `[split][row][n]`, padded rows of N included. */
function storePartial(kernel: CodeKernel, lanes: BatchLanes): string {
  const { batch, rowsPerThread, threads, order } = kernel;
  return times(batch, (b) =>
    `  if (first + ${b}u < rows) {
    let at = ((split * params.row_cap + workgroup.z * ${batch}u + ${b}u) * params.partial_stride + block * ${order.rowBlock}u) / 4u + lane;
${
      times(rowsPerThread / 4, (t) =>
        `    y[at + ${t * threads}u] = vec4<f32>(${
          [0, 1, 2, 3].map((r) => lanes.lane(`acc${4 * t + r}_`, b)).join(", ")
        });`)
    }
  }`);
}

function storeDirect(kernel: CodeKernel, lanes: BatchLanes): string {
  const { batch, rowsPerThread, threads, order } = kernel;
  return times(rowsPerThread, (r) =>
    `  {
    let n = block * ${order.rowBlock}u + (lane + ${(r >> 2) * threads}u) * 4u + ${r & 3}u;
    if (n < params.n) {
${
      times(batch, (b) =>
        `      if (first + ${b}u < rows) { put(range_start() + first + ${b}u, n, ${
          lanes.lane(`acc${r}_`, b)
        }); }`)
    }
    }
  }`);
}
