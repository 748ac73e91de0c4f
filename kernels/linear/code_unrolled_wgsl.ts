/**
 * WGSL of the CodeGEMM decode kernels for GPUs: a turn's code words and scales are loaded into
 * registers first, and every position is code of its own.
 *
 * @module
 */
import type { CodeBody, CodeKernel } from "./code_kernel.ts";
import {
  activationBytes,
  addGroup,
  loadActivations,
  psumbooksPerStage,
  splat,
  sumVariables,
} from "./code_kernel.ts";
import { gcd } from "./order.ts";
import type { BatchLanes } from "./wgsl.ts";
import { spread, times } from "./wgsl.ts";

/** Psumbooks of as many positions as fit are made in workgroup memory, then gathered from. */
export function unrolledPsumbook(kernel: CodeKernel, lanes: BatchLanes): CodeBody {
  const { format: { m, v }, order, threads, rowsPerThread } = kernel;
  const stage = psumbooksPerStage(kernel);
  const entries = Array.from({ length: kernel.turnPositions * m }, (_, e) => ({
    position: Math.floor(e / m),
    codebook: e % m,
    slot: e % stage,
  }));
  const parts = [loadWords(kernel), loadScales(kernel), loadActivations(kernel, lanes, "")];
  for (let from = 0; from < entries.length; from += stage) {
    const staged = entries.slice(from, from + stage);
    // The last stage's gathers are done, and the activations are there.
    parts.push("workgroupBarrier();");
    for (let k = 0; k < m; k++) {
      const own = staged.filter((entry) => entry.codebook === k);
      if (own.length === 0) continue;
      const fill = own.map((entry) => fillEntry(entry, v, lanes)).join("\n");
      parts.push(spread(256, threads, true, `${loadCentroid(v, k)}\n${fill}`));
    }
    parts.push("workgroupBarrier();");
    for (const { position, codebook, slot } of staged) {
      const opens = position % order.groupPositions === 0 && codebook === 0;
      const closes = (position + 1) % order.groupPositions === 0 && codebook === m - 1;
      for (let r = 0; r < rowsPerThread; r++) {
        parts.push(`{ let at = ${slot * 256}u + ${codeOf(position, codebook, r)};`);
        for (let j = 0; j < lanes.vectors; j++) {
          parts.push(`sum${r}_${j} ${opens ? "=" : "+="} book${j}[at];`);
          if (closes) parts.push(addGroup(lanes, scaleOf(kernel, position, r), r, j));
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
        `var<workgroup> activations${j}: array<${lanes.type("f16")}, ${kernel.turnPositions * v}>;`,
    ),
    prologue: sumVariables(kernel, lanes),
    turn: parts.join("\n"),
  };
}

/** One thread's entry of a Psumbook: the inner product of its centroid and the activations. */
function fillEntry(
  { position, slot }: { position: number; slot: number },
  v: number,
  lanes: BatchLanes,
): string {
  return times(lanes.vectors, (j) => {
    const products = times(v, (e) => {
      const activation = `${lanes.type("f32")}(activations${j}[${position * v + e}])`;
      const centroid = splat(lanes, "f32", `c${e}`);
      return e === 0
        ? `p = ${activation} * ${centroid};`
        : `p = fma(${activation}, ${centroid}, p);`;
    });
    return `{ var p: ${lanes.type("f32")};\n${products}\n` +
      `book${j}[${slot * 256}u + i] = ${lanes.type("f16")}(p); }`;
  });
}

/** A code gathers its centroid, which is multiplied with the activations. */
export function unrolledDequantize(kernel: CodeKernel, lanes: BatchLanes): CodeBody {
  const { format: { m, v }, order, threads, rowsPerThread } = kernel;
  const count = kernel.turnPositions * v;
  const vectors = v % 4 === 0 ? v / 4 : v;
  // The codebooks stand in workgroup memory where there is room.
  const local = m * 256 * v * 2 + 2 * activationBytes(kernel) <= kernel.workgroupBytes;
  const table = local ? "table" : "codebooks";
  const parts = [
    loadWords(kernel),
    loadScales(kernel),
    `let half = (turn & 1u) * ${count}u;`,
    loadActivations(kernel, lanes, "half + "),
    // One barrier is enough: a half is written again only after everyone passed the next barrier.
    "workgroupBarrier();",
  ];
  for (let position = 0; position < kernel.turnPositions; position++) {
    const opens = position % order.groupPositions === 0;
    const closes = (position + 1) % order.groupPositions === 0;
    for (let r = 0; r < rowsPerThread; r++) {
      parts.push("{");
      for (let k = 0; k < m; k++) {
        parts.push(`let at${k} = (${k * 256}u + ${codeOf(position, k, r)}) * ${vectors}u;`);
      }
      for (let e = 0; e < v; e++) {
        const single = v % 4 !== 0;
        if (single || e % 4 === 0) {
          const at = single ? e : e / 4;
          const sum = Array.from({ length: m }, (_, k) => `${table}[at${k} + ${at}u]`).join(" + ");
          parts.push(`let c${at} = ${sum};`);
        }
        const centroid = single ? `c${e}` : `c${e >> 2}.${"xyzw"[e & 3]}`;
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
          if (last) parts.push(addGroup(lanes, scaleOf(kernel, position, r), r, j));
        }
      }
      parts.push("}");
    }
  }
  const tableSize = m * 256 * vectors;
  return {
    declarations: times(
      lanes.vectors,
      (j) => `var<workgroup> activations${j}: array<${lanes.type("f16")}, ${2 * count}>;`,
    ) + (local ? `\nvar<workgroup> table: array<${centroidType(v)}, ${tableSize}>;` : ""),
    prologue: sumVariables(kernel, lanes) +
      (local ? "\n" + spread(tableSize, threads, true, "table[i] = codebooks[i];") : ""),
    turn: parts.join("\n"),
  };
}

/** The WGSL element of the codebooks binding. */
export function centroidType(v: number): string {
  return v % 4 === 0 ? "vec4<f16>" : "f16";
}

/** Centroid `i` of codebook `k` as float32 scalars c0, c1, ... */
function loadCentroid(v: number, k: number): string {
  const index = `(${k * 256}u + i)`;
  if (v % 4 !== 0) return times(v, (e) => `let c${e} = f32(codebooks[${index} * ${v}u + ${e}u]);`);
  return times(v / 4, (q) =>
    `let q${q} = vec4<f32>(codebooks[${index} * ${v / 4}u + ${q}u]);\n` +
    times(4, (e) => `let c${4 * q + e} = q${q}.${"xyzw"[e]};`));
}

/** Code words of the turn: `w<word>_<codebook>_<row quad>`. */
function loadWords(kernel: CodeKernel): string {
  const { turnPositions, format: { m }, rowsPerThread, threads, order } = kernel;
  const words = turnPositions / 4;
  const rowQuads = order.rowBlock / 4;
  return `let word_at = (turn_at * ${words}u * ${m}u) * ${rowQuads}u + lane;\n` +
    times(
      words,
      (q) =>
        times(
          m,
          (k) =>
            times(rowsPerThread / 4, (t) =>
              `let w${q}_${k}_${t} = codes[word_at + ${(q * m + k) * rowQuads + t * threads}u];`),
        ),
    );
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
      }u) / ${order.scalePositions}u) * ${rowQuads}u + lane;\n` +
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

function codeOf(position: number, codebook: number, r: number): string {
  const word = `w${position >> 2}_${codebook}_${r >> 2}.${"xyzw"[r & 3]}`;
  const byte = position & 3;
  if (byte === 0) return `(${word} & 255u)`;
  return byte === 3 ? `(${word} >> 24u)` : `((${word} >> ${8 * byte}u) & 255u)`;
}
