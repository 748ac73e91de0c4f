/**
 * Times the linear kernels with timestamp queries, weights rotated past the cache.
 *
 *     deno run --allow-env --allow-write kernels/linear/linear_bench.ts --shape 8b --rows 1,2,4,8
 *
 * @module
 */
import { FleetError } from "../../shared/errors.ts";
import { parseFlags, runCommand } from "../../shared/flags.ts";
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import { Gpu } from "../gpu.ts";
import type { StepShape } from "../kernel.ts";
import { STEP_BYTES, stepWords } from "../kernel.ts";
import { createLinear, linearScratchBytes } from "./linear.ts";
import { loadMatrix } from "./matrix.ts";
import type { Tuning } from "./order.ts";
import { DEFAULT_TUNING } from "./order.ts";
import { randomTensors } from "./random_tensors.ts";
import type { Linear, Matrix, MatrixShape } from "./types.ts";
import type { Variant } from "./variant.ts";

/** The matrices of one layer, fused as the authors' measurements are. */
const SHAPES: Record<string, MatrixShape[]> = {
  "70b": [[10240, 8192], [8192, 8192], [57344, 8192], [8192, 28672]],
  "8b": [[6144, 4096], [4096, 4096], [28672, 4096], [4096, 14336]],
  demo: [[384, 384], [1024, 384], [384, 1024], [4096, 384]],
};

const FAMILIES = ["codegemm", "dequantize", "prefill"] as const;
type Family = typeof FAMILIES[number];

/** One line of the table. */
interface Measurement {
  n: number;
  k: number;
  format: string;
  family: Family | "dense";
  rows: number;
  /** Median GPU time of one application, reduction and store included. */
  microseconds: number;
  /** Weight bytes per second. */
  gigabytesPerSecond: number;
  teraflops: number;
  /** First use: what compiling costs where the driver compiles late. */
  firstMs: number;
}

/** What all measurements share. */
interface Setting {
  gpu: Gpu;
  cacheBytes: number;
  repeats: number;
  variant: Partial<Variant>;
  tuning: Tuning;
}

function parseFormat(text: string): CodeGemmFormat | null {
  if (text === "dense") return null;
  const match = /^m(\d+)v(\d+)g(\d+)$/.exec(text);
  if (!match) throw new FleetError("bad-usage", `--format takes dense or m1v4g128, not ${text}`);
  const [m, v, g] = match.slice(1).map(Number);
  return { m, v, g, b: 8 };
}

/** Copies of a matrix of which no cache holds much. */
async function loadCopies(
  { gpu, cacheBytes, tuning }: Setting,
  shape: MatrixShape,
  format: CodeGemmFormat | null,
): Promise<Matrix[]> {
  const tensors = randomTensors("w", shape, format, 1);
  const copies = [await loadMatrix(gpu, tensors, "w", shape, format, { tuning })];
  const wanted = Math.min(32, Math.ceil(cacheBytes / copies[0].bytes));
  while (copies.length < wanted) {
    copies.push(await loadMatrix(gpu, tensors, "w", shape, format, { tuning }));
  }
  return copies;
}

/** Times one kernel at one number of rows. */
async function measure(
  setting: Setting,
  copies: Matrix[],
  family: Family,
  rows: number,
): Promise<Omit<Measurement, "format">> {
  const { gpu, repeats, variant } = setting;
  const [{ n, k, format, order, bytes }] = copies;
  const range = family === "prefill" ? "prefill" : "decode";
  const shape: StepShape = {
    decodeRows: range === "decode" ? rows : 0,
    rows,
    outputs: 0,
    contextTokens: 1,
  };
  const x = new Float16Array(rows * k).map((_, i) => Math.sin(i));
  const input = gpu.upload("x", new Uint16Array(x.buffer));
  const output = gpu.storage("y", rows * n * 4);
  const scratch = gpu.storage("scratch", linearScratchBytes([n, k], format, rows, order));
  const step = gpu.buffer("step", STEP_BYTES, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST);
  gpu.write(step, 0, stepWords(shape));
  const linears: Linear[] = [];
  for (const matrix of copies) {
    linears.push(
      await createLinear({
        gpu,
        label: `${n} x ${k} ${family}`,
        matrix,
        step,
        input: { buffer: input, stride: k, offset: 0 },
        output: { buffer: output, stride: n, offset: 0 },
        store: "store",
        maxRows: rows,
        scratch,
        ranges: [range],
        profile: { version: 1, decode: family === "dequantize" ? "dequantize" : "codegemm" },
        variant,
      }),
    );
  }
  const encode = (pass: GPUComputePassEncoder) => {
    for (const linear of linears) linear.encode(pass, shape, range);
  };
  const began = performance.now();
  await timePass(gpu, encode);
  const firstMs = performance.now() - began;
  const times: number[] = [];
  for (let i = 0; i < repeats; i++) times.push(await timePass(gpu, encode) / linears.length);
  times.sort((a, b) => a - b);
  const microseconds = times[times.length >> 1];
  for (const buffer of [input, output, scratch, step]) buffer.destroy();
  for (const linear of linears) linear.destroy();
  return {
    n,
    k,
    family: format === null && family !== "prefill" ? "dense" : family,
    rows,
    microseconds,
    gigabytesPerSecond: bytes / microseconds / 1e3,
    teraflops: 2 * n * k * rows / microseconds / 1e6,
    firstMs,
  };
}

/** GPU microseconds of one compute pass. */
async function timePass(gpu: Gpu, encode: (pass: GPUComputePassEncoder) => void): Promise<number> {
  const querySet = gpu.device.createQuerySet({ type: "timestamp", count: 2 });
  const resolved = gpu.buffer(
    "timestamps",
    16,
    GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC,
  );
  const encoder = gpu.device.createCommandEncoder();
  const pass = encoder.beginComputePass({
    timestampWrites: { querySet, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 },
  });
  encode(pass);
  pass.end();
  encoder.resolveQuerySet(querySet, 0, 2, resolved, 0);
  gpu.device.queue.submit([encoder.finish()]);
  const [from, to] = new BigUint64Array(await gpu.read(resolved, 16));
  resolved.destroy();
  querySet.destroy();
  return Number(to - from) / 1e3;
}

async function main(): Promise<void> {
  const { values } = parseFlags({
    command: "linear_bench",
    summary: "Times the linear kernels.",
    flags: {
      shape: { type: "string", default: "demo", help: "70b, 8b, demo, or NxK,NxK,..." },
      format: {
        type: "string",
        default: "dense,m1v4g128,m2v8g128",
        help: "dense or m..v..g.., separated by commas",
      },
      family: { type: "string", default: FAMILIES.join(), help: "codegemm, dequantize, prefill" },
      rows: { type: "string", default: "1,2,4,8", help: "rows of decode steps" },
      "prefill-rows": { type: "string", default: "32,256", help: "rows of prefill steps" },
      repeats: { type: "integer", default: 9, min: 1, help: "passes of which the median counts" },
      cache: { type: "bytes", help: "rotate weights over this much (256MiB; 0 in software)" },
      limits: { type: "string", default: "adapter", help: "adapter or default" },
      variant: { type: "string", default: "{}", help: 'JSON, such as {"turnK": 32}' },
      tuning: { type: "string", default: "{}", help: 'JSON, such as {"wantedWorkgroups": 1024}' },
      out: { type: "string", help: "a file for the figures as JSON" },
    },
  });
  const gpu = await Gpu.open({
    software: true,
    limits: values.limits === "default" ? "default" : "adapter",
  });
  if (!gpu.timestamps) throw new FleetError("gpu", `${gpu.info.name} has no timestamp queries`);
  const setting: Setting = {
    gpu,
    cacheBytes: values.cache ?? (gpu.info.software ? 0 : 256 * 2 ** 20),
    repeats: values.repeats,
    variant: JSON.parse(values.variant),
    tuning: { ...DEFAULT_TUNING, ...JSON.parse(values.tuning) },
  };
  const shapes = SHAPES[values.shape] ??
    values.shape.split(",").map((shape) => shape.split("x").map(Number) as [number, number]);
  const families = FAMILIES.filter((family) => values.family.split(",").includes(family));

  console.log(gpu.info.name);
  console.log(
    "    N x K          format    family      rows        us     GB/s  TFLOP/s  first ms",
  );
  const measurements: Measurement[] = [];
  for (const name of values.format.split(",")) {
    const format = parseFormat(name);
    for (const shape of shapes) {
      const copies = await loadCopies(setting, shape, format);
      for (const family of families) {
        if (format === null && family === "dequantize") continue;
        const counts = family === "prefill" ? values["prefill-rows"] : values.rows;
        for (const rows of counts.split(",").map(Number)) {
          const measured = { ...await measure(setting, copies, family, rows), format: name };
          measurements.push(measured);
          console.log(line(measured));
        }
      }
      for (const copy of copies) copy.destroy();
    }
  }
  if (values.out !== undefined) {
    const { variant, tuning } = setting;
    const report = { adapter: gpu.info, variant, tuning, measurements };
    await Deno.writeTextFile(values.out, JSON.stringify(report, null, 2) + "\n");
  }
  gpu.close();
}

function line(m: Measurement): string {
  return [
    `${m.n} x ${m.k}`.padStart(14),
    m.format.padStart(12),
    m.family.padEnd(10).padStart(14),
    String(m.rows).padStart(6),
    m.microseconds.toFixed(1).padStart(10),
    m.gigabytesPerSecond.toFixed(0).padStart(8),
    m.teraflops.toFixed(2).padStart(8),
    m.firstMs.toFixed(0).padStart(9),
  ].join(" ");
}

if (import.meta.main) await runCommand(main);
