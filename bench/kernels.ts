/**
 * The kernels of a layer at the shapes of Llama 3: GPU time by timestamp queries. Linear kernels with
 * weights rotated past the cache, partial sums and their reduction included, beside what reading alone
 * costs on this GPU; or, with `--transformer`, all that stands between them; or, with `--tiles`, every
 * tile that prefill kernels could have.
 *
 *     deno task bench kernels --shape llama-3-70b --format m1v4g128 --rows 1,2,4,8,16,32
 *     deno task bench kernels --shape llama-3-70b --transformer --rows 1,8,32 --contexts 1024,8192
 *     deno task bench kernels --shape llama-3-70b --tiles --format m1v4g128 --prefill-rows 32,256
 *
 * @module
 */
import { Gpu } from "../kernels/gpu.ts";
import { PassTimer } from "../kernels/pass_timer.ts";
import {
  type Linear,
  type Matrix,
  syntheticCodes,
  syntheticDense,
  TrialBuffers,
} from "../kernels/linear/mod.ts";
import { parseFormatName } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import type { CodeGemmFormat } from "../shared/model_config.ts";
import type { NumericsProfile } from "../shared/protocol.ts";
import { printTiles, type TileTime, timeTiles } from "./prefill_tiles.ts";
import { benchTransformer, type TransformerMeasurement } from "./transformer_kernels.ts";

/** What runs as one dispatch: matrices of one input, stacked. */
interface BenchMatrix {
  name: string;
  members: number[];
  k: number;
}

const SHAPES: Record<string, BenchMatrix[]> = {
  "llama-3-70b": [
    { name: "q|k|v", members: [8192, 1024, 1024], k: 8192 },
    { name: "o", members: [8192], k: 8192 },
    { name: "gate|up", members: [28672, 28672], k: 8192 },
    { name: "down", members: [8192], k: 28672 },
  ],
  "llama-3-8b": [
    { name: "q|k|v", members: [4096, 1024, 1024], k: 4096 },
    { name: "o", members: [4096], k: 4096 },
    { name: "gate|up", members: [14336, 14336], k: 4096 },
    { name: "down", members: [4096], k: 14336 },
  ],
  /** For trying the benchmark itself on a software adapter. */
  tiny: [
    { name: "q|k|v", members: [512, 256, 256], k: 512 },
    { name: "down", members: [512], k: 1024 },
  ],
};

/** The output head, always dense float16. */
const HEADS: Record<string, BenchMatrix> = {
  "llama-3-70b": { name: "head", members: [128_256], k: 8192 },
  "llama-3-8b": { name: "head", members: [128_256], k: 4096 },
  tiny: { name: "head", members: [1000], k: 512 },
};

const FAMILIES = ["codegemm", "dequantize", "int8", "prefill", "int8-prefill"] as const;
type Family = typeof FAMILIES[number];

function isPrefill(family: Family): boolean {
  return family === "prefill" || family === "int8-prefill";
}

/** Dense has one family of decode kernels; codes of more than 8 bits the dequantizing one. */
function runs(format: CodeGemmFormat | null, family: Family): boolean {
  if (family === "prefill") return true;
  return format === null ? family === "codegemm" : format.b <= 8 || family === "dequantize";
}

/** The family of the profile that a family of kernels is run with. */
function decodeOf(family: Family): NumericsProfile["decode"] {
  if (family === "prefill") return "codegemm";
  return family === "int8-prefill" ? "int8" : family;
}

/** GPU work ahead of each figure. */
const BUSY_MS = 60;
/** The same where very many are compared. */
const TILE_BUSY_MS = 15;

/** One cell of the table. */
interface Measurement {
  matrix: string;
  n: number;
  k: number;
  format: string;
  family: Family | "dense";
  rows: number;
  /** Of one application, reduction and store included. */
  microseconds: number;
  gigabytesPerSecond: number;
  /** Of the bandwidth that a plain reader reached in the same run. */
  bandwidthShare: number;
  teraflops: number;
}

/** GB/s of a kernel that reads a buffer once, 16 bytes a load, and keeps almost nothing. */
async function readBandwidth(gpu: Gpu, timer: PassTimer): Promise<number> {
  const bytes = gpu.info.software ? 2 ** 24 : 2 ** 30;
  const loads = 16;
  const bindings = ["read", "write"] as const;
  const pipeline = await gpu.pipeline({
    label: "read",
    bindings,
    code: /* wgsl */ `
@group(0) @binding(0) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> kept: array<u32>;
@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let at = (workgroup.y * 1024u + workgroup.x) * ${256 * loads}u + lane;
${Array.from({ length: loads }, (_, i) => `  let w${i} = words[at + ${i * 256}u];`).join("\n")}
  let all = ${Array.from({ length: loads }, (_, i) => `w${i}`).join(" ^ ")};
  if ((all.x ^ all.y ^ all.z ^ all.w) == 0x9e3779b9u) { kept[lane] = 1u; }
}`,
  });
  const words = gpu.storage("words", bytes);
  const kept = gpu.storage("kept", 1024);
  const group = gpu.device.createBindGroup({
    layout: gpu.bindings(bindings),
    entries: [words, kept].map((buffer, binding) => ({ binding, resource: { buffer } })),
  });
  const groups = bytes / (256 * loads * 16);
  const microseconds = await timer.median((pass) => {
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(Math.min(groups, 1024), Math.ceil(groups / 1024));
  });
  words.destroy();
  kept.destroy();
  return bytes / microseconds / 1e3;
}

/** Copies of a matrix of which no cache holds much. */
async function makeCopies(
  gpu: Gpu,
  { name, members, k }: BenchMatrix,
  format: CodeGemmFormat | null,
  cacheBytes: number,
): Promise<Matrix[]> {
  const n = members.reduce((sum, rows) => sum + rows, 0);
  const make = (seed: number) =>
    format === null
      ? syntheticDense(gpu, name, n, k, seed)
      : syntheticCodes(gpu, name, members, k, format, seed);
  const copies = [await make(1)];
  const wanted = Math.min(32, Math.ceil(cacheBytes / copies[0].bytes));
  while (copies.length < wanted) copies.push(await make(copies.length + 1));
  return copies;
}

/** Microseconds of one kernel at one number of rows. */
async function measure(
  gpu: Gpu,
  timer: PassTimer,
  copies: Matrix[],
  family: Family,
  rows: number,
): Promise<number> {
  const [{ n, k }] = copies;
  const range = isPrefill(family) ? "prefill" : "decode";
  const x = Float16Array.from({ length: rows * k }, (_, i) => Math.sin(i));
  const buffers = new TrialBuffers(gpu, copies[0], x);
  const shape = buffers.setRows(range, rows);
  const decode = decodeOf(family);
  const label = `${n} x ${k} ${family}`;
  const linears: Linear[] = [];
  for (const matrix of copies) linears.push(await buffers.bind(matrix, { label, range, decode }));
  const microseconds = await timer.median((pass) =>
    linears.forEach((linear) => linear.encode(pass, shape, range))
  );
  buffers.destroy();
  for (const linear of linears) linear.destroy();
  return microseconds / copies.length;
}

function measurement(
  matrix: string,
  format: string,
  { n, k, bytes, format: codes }: Matrix,
  family: Family,
  rows: number,
  microseconds: number,
  readGBps: number,
): Measurement {
  const gigabytesPerSecond = bytes / microseconds / 1e3;
  return {
    matrix,
    n,
    k,
    format,
    family: codes === null && !isPrefill(family) ? "dense" : family,
    rows,
    microseconds,
    gigabytesPerSecond,
    bandwidthShare: gigabytesPerSecond / readGBps,
    teraflops: 2 * n * k * rows / microseconds / 1e6,
  };
}

function parseFormat(text: string): CodeGemmFormat | null {
  if (text === "dense") return null;
  const format = parseFormatName(text);
  if (format) return format;
  throw new FleetError("bad-usage", `--format takes dense, m1v4g128 or m1v8b16, not ${text}`);
}

/** A row per family and number of rows, a column per matrix, and what a layer takes. */
function printTable(format: string, matrices: BenchMatrix[], measured: Measurement[]): void {
  const of = measured.filter((measurement) => measurement.format === format);
  const head = matrices.map(({ name }) => name.padStart(9)).join("");
  console.log(`\n${format.padEnd(12)} rows${head}    layer us    GB/s  of read  TFLOP/s`);
  for (const key of new Set(of.map(({ family, rows }) => `${family} ${rows}`))) {
    const [family, rows] = key.split(" ");
    const cells = of.filter((m) => m.family === family && m.rows === Number(rows));
    const total = cells.reduce((sum, { microseconds }) => sum + microseconds, 0);
    const mean = (value: (m: Measurement) => number) =>
      cells.reduce((sum, m) => sum + value(m) * m.microseconds, 0) / total;
    console.log(
      family.padEnd(12) + rows.padStart(5) +
        cells.map(({ microseconds }) => microseconds.toFixed(1).padStart(9)).join("") +
        total.toFixed(1).padStart(12) + mean((m) => m.gigabytesPerSecond).toFixed(0).padStart(8) +
        `${(100 * mean((m) => m.bandwidthShare)).toFixed(0)} %`.padStart(9) +
        mean((m) => m.teraflops).toFixed(1).padStart(9),
    );
  }
}

/** Times the prefill tiles on a layer's matrices. */
async function tilesOfLayer(
  gpu: Gpu,
  matrices: BenchMatrix[],
  format: CodeGemmFormat | null,
  family: Family,
  rowCounts: string,
): Promise<TileTime[]> {
  const timer = new PassTimer(gpu, TILE_BUSY_MS);
  const times: TileTime[] = [];
  for (const of of matrices) {
    const [matrix] = await makeCopies(gpu, of, format, 0);
    for (const rows of rowCounts.split(",").map(Number)) {
      times.push(...await timeTiles(gpu, timer, matrix, rows, decodeOf(family)));
    }
    matrix.destroy();
  }
  timer.destroy();
  return times;
}

async function main(): Promise<void> {
  const { values } = parseFlags({
    command: "bench kernels",
    summary: "Times the linear kernels of a layer, or those between them.",
    flags: {
      shape: { type: "string", default: "llama-3-70b", help: Object.keys(SHAPES).join(", ") },
      format: {
        type: "string",
        default: "m1v4g128,m2v8g128",
        help: "dense, m1v4g128, m1v8b16 (AQLM's 1x16), ..., separated by commas",
      },
      transformer: { type: "boolean", help: "time norm, RoPE, attention and SwiGLU instead" },
      contexts: {
        type: "string",
        default: "1024,8192",
        help: "positions of a sequence, for those",
      },
      family: { type: "string", default: FAMILIES.join(), help: FAMILIES.join(", ") },
      rows: { type: "string", default: "1,2,4,8,16,32,64", help: "rows of decode steps" },
      "prefill-rows": { type: "string", default: "32,256", help: "rows of prefill steps" },
      tiles: { type: "boolean", help: "time the tiles of prefill kernels only, at --prefill-rows" },
      cache: { type: "bytes", help: "rotate weights over this much (400MiB; 0 in software)" },
      software: { type: "boolean", help: "run on the CPU where there is no GPU" },
      out: { type: "path", help: "a file for the figures as JSON" },
    },
  });
  const matrices = SHAPES[values.shape];
  if (!matrices) throw new FleetError("bad-usage", `There is no shape ${values.shape}`);
  const gpu = await Gpu.open({ software: values.software });
  const timer = new PassTimer(gpu, BUSY_MS);
  const readGBps = await readBandwidth(gpu, timer);
  console.log(`${gpu.info.name}: ${values.shape}, reads ${readGBps.toFixed(0)} GB/s`);
  const cacheBytes = values.cache ?? (gpu.info.software ? 0 : 400 * 2 ** 20);
  const rowCounts = values.rows.split(",").map(Number);
  const report = async (measurements: (Measurement | TransformerMeasurement)[]) => {
    timer.destroy();
    if (values.out !== undefined) {
      const figures = { adapter: gpu.info, readGBps, shape: values.shape, measurements };
      await Deno.writeTextFile(values.out, JSON.stringify(figures, null, 2) + "\n");
    }
    gpu.close();
  };
  if (values.transformer) {
    const contexts = values.contexts.split(",").map(Number);
    const options = { shape: values.shape, rows: rowCounts, contexts, cacheBytes };
    return await report(await benchTransformer(gpu, timer, options));
  }
  const families = FAMILIES.filter((family) => values.family.split(",").includes(family));
  const measurements: Measurement[] = [];
  const tileTimes: Record<string, TileTime[]> = {};
  for (const name of values.format.split(",")) {
    const format = parseFormat(name);
    if (values.tiles) {
      for (const family of families.filter((family) => isPrefill(family) && runs(format, family))) {
        const title = `${name}, ${family}`;
        const times = await tilesOfLayer(gpu, matrices, format, family, values["prefill-rows"]);
        tileTimes[title] = times;
        printTiles(title, times);
      }
      continue;
    }
    for (const matrix of matrices) {
      const copies = await makeCopies(gpu, matrix, format, cacheBytes);
      for (const family of families) {
        if (!runs(format, family)) continue;
        const prefillCounts = values["prefill-rows"].split(",").map(Number);
        for (const rows of isPrefill(family) ? prefillCounts : rowCounts) {
          const microseconds = await measure(gpu, timer, copies, family, rows);
          measurements.push(
            measurement(matrix.name, name, copies[0], family, rows, microseconds, readGBps),
          );
        }
      }
      for (const copy of copies) copy.destroy();
    }
    printTable(name, matrices, measurements);
  }
  if (!values.tiles) {
    const head = HEADS[values.shape];
    const copies = await makeCopies(gpu, head, null, cacheBytes);
    for (const rows of rowCounts) {
      const microseconds = await measure(gpu, timer, copies, "codegemm", rows);
      const at = measurement(
        head.name,
        "dense",
        copies[0],
        "codegemm",
        rows,
        microseconds,
        readGBps,
      );
      measurements.push(at);
      console.log(
        `${rows === rowCounts[0] ? "\n" : ""}output head, float16, ${rows} rows: ` +
          `${microseconds.toFixed(1)} us, ${at.gigabytesPerSecond.toFixed(0)} GB/s`,
      );
    }
    copies.forEach((copy) => copy.destroy());
  }
  await report(measurements);
}

if (import.meta.main) await runCommand(main);
