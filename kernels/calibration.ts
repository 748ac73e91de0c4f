/**
 * How fast this GPU decodes, measured when a worker joins: the planner places layers by it.
 *
 * Decode reads every weight once per step, so a matrix costs its bytes over a rate. The rate is the
 * slope of GPU time between a large and a tiny matrix, run by the real kernels over rotated copies
 * that together exceed a GPU's last cache; what the tiny ones cost, with the rest of a layer and the
 * encoding of it all, is the overhead.
 *
 * @module
 */
import {
  bitsPerWeight,
  type CodeGemmFormat,
  ROW_SCALE,
  type TensorInfo,
  type TensorSource,
} from "../shared/model_config.ts";
import { fastestDecode, type WorkerCard } from "../shared/protocol.ts";
import type { Gpu } from "./gpu.ts";
import { STEP_BYTES, type StepShape, stepWords } from "./kernel.ts";
import {
  createLinear,
  type Linear,
  linearScratchBytes,
  loadMatrix,
  type Matrix,
  type MatrixShape,
  randomTensors,
} from "./linear/mod.ts";
import { Readback } from "./readback.ts";
import {
  createDecodeAttention,
  createDecodeScratch,
  createRmsNorm,
  createRope,
  createSwiGlu,
  destroyDecodeScratch,
  headShape,
  kvPageBytes,
  ropeAngles,
  StepBuffers,
  tileRows,
} from "./transformer/mod.ts";
import { Workbench } from "./workbench.ts";

/** How much to measure on. */
interface Scale {
  dense: MatrixShape;
  codes: MatrixShape;
  /** Of all copies of a matrix together. */
  rotatedBytes: number;
  /** Of one measurement. */
  leastMs: number;
}

/** Last caches of GPUs go up to about 128 MiB; the matrices are like those of 8B to 70B models. */
const HARDWARE: Scale = {
  dense: [8192, 4096],
  codes: [28672, 4096],
  rotatedBytes: 192 * 2 ** 20,
  leastMs: 8,
};
const SOFTWARE: Scale = {
  dense: [512, 512],
  codes: [512, 512],
  rotatedBytes: 2 ** 20,
  leastMs: 3,
};

const FORMAT: CodeGemmFormat = { m: 1, v: 4, g: 128, b: 8 };
/** AQLM's 1x16, the format of codes of more than 8 bits. */
const WIDE: CodeGemmFormat = { m: 1, v: 8, g: ROW_SCALE, b: 16 };
const TINY: MatrixShape = [128, 128];
const LINEARS_PER_LAYER = 7;
const ROW: StepShape = { decodeRows: 1, rows: 1, outputs: 0, contextTokens: 1 };
/** Runs of one submit at most. */
const MAX_RUNS = 4096;
const MEASUREMENTS = 3;
const ROUNDS = 2;
/** Two timestamps, u64. */
const STAMPS_BYTES = 16;

/**
 * Measures for about a tenth of a second of the GPU's time (longer on a software adapter).
 *
 * @throws FleetError `gpu` when the device fails, `out-of-memory`
 */
export async function calibrate(gpu: Gpu): Promise<WorkerCard["calibration"]> {
  const scale = gpu.info.software ? SOFTWARE : HARDWARE;
  const bench = new Workbench(gpu);
  const meter = bench.keep(await Meter.create(gpu, scale.leastMs));
  try {
    const { rotatedBytes } = scale;
    const [dense, denseTiny, codes, codesTiny, wide, wideTiny, others] = await meter.timeAll([
      await rotatedLinears(bench, scale.dense, null, rotatedBytes),
      await rotatedLinears(bench, TINY, null, 0),
      await rotatedLinears(bench, scale.codes, FORMAT, rotatedBytes),
      await rotatedLinears(bench, TINY, FORMAT, 0),
      await rotatedLinears(bench, scale.codes, WIDE, rotatedBytes),
      await rotatedLinears(bench, TINY, WIDE, 0),
      await restOfLayer(bench),
    ]);
    return {
      denseBytesPerMs: slope(scale.dense, null, dense.gpuMs, denseTiny.gpuMs),
      codegemmBytesPerMs: slope(scale.codes, FORMAT, codes.gpuMs, codesTiny.gpuMs),
      wideCodeBytesPerMs: slope(scale.codes, WIDE, wide.gpuMs, wideTiny.gpuMs),
      overheadMsPerLayer: LINEARS_PER_LAYER * (codesTiny.gpuMs + codesTiny.encodeMs) +
        others.gpuMs + others.encodeMs,
    };
  } finally {
    bench.destroy();
  }
}

/** Encodes the i-th run. */
type Run = (pass: GPUComputePassEncoder, i: number) => void;

function weightBytes([n, k]: MatrixShape, format: CodeGemmFormat | null): number {
  return n * k * (format ? bitsPerWeight(format) : 16) / 8;
}

/** Bytes per ms between a tiny matrix and a large one; a noisy clock must not make it negative. */
function slope(
  shape: MatrixShape,
  format: CodeGemmFormat | null,
  ms: number,
  tinyMs: number,
): number {
  const bytes = weightBytes(shape, format);
  return ms > tinyMs ? (bytes - weightBytes(TINY, format)) / (ms - tinyMs) : bytes / ms;
}

/** What one run takes. */
interface RunTime {
  /** On the CPU, to encode. */
  encodeMs: number;
  /** By the GPU's timestamps, or from submit to readback where it has none. */
  gpuMs: number;
}

function least(a: RunTime, b: RunTime): RunTime {
  return { encodeMs: Math.min(a.encodeMs, b.encodeMs), gpuMs: Math.min(a.gpuMs, b.gpuMs) };
}

/** Times runs, over submits of as many as take `leastMs`. */
class Meter {
  readonly #gpu: Gpu;
  readonly #readback: Readback;
  readonly #leastMs: number;
  readonly #queries: GPUQuerySet | null;
  readonly #stamps: GPUBuffer;

  private constructor(gpu: Gpu, readback: Readback, leastMs: number) {
    this.#gpu = gpu;
    this.#readback = readback;
    this.#leastMs = leastMs;
    this.#queries = gpu.timestamps
      ? gpu.device.createQuerySet({ type: "timestamp", count: 2 })
      : null;
    const usage = GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC;
    this.#stamps = gpu.buffer("calibration timestamps", STAMPS_BYTES, usage);
  }

  static async create(gpu: Gpu, leastMs: number): Promise<Meter> {
    return new Meter(gpu, await Readback.create(gpu, STAMPS_BYTES), leastMs);
  }

  /** The least of all rounds: a GPU that idled while the weights were made raises its clocks in the first. */
  async timeAll(runs: Run[]): Promise<RunTime[]> {
    const best: RunTime[] = runs.map(() => ({ encodeMs: Infinity, gpuMs: Infinity }));
    for (let round = 0; round < ROUNDS; round++) {
      for (const [i, run] of runs.entries()) best[i] = least(best[i], await this.#time(run));
    }
    return best;
  }

  /** The least of several measurements, each of as many runs as take `leastMs`. */
  async #time(run: Run): Promise<RunTime> {
    let runs = 1, best = await this.#submit(run, runs);
    while (best.gpuMs * runs < this.#leastMs && runs < MAX_RUNS) {
      runs *= 2;
      best = await this.#submit(run, runs);
    }
    for (let i = 1; i < MEASUREMENTS; i++) best = least(best, await this.#submit(run, runs));
    return best;
  }

  destroy(): void {
    this.#queries?.destroy();
    this.#stamps.destroy();
    this.#readback.destroy();
  }

  /** What each of `runs` runs takes that are submitted together. */
  async #submit(run: Run, runs: number): Promise<RunTime> {
    const startedMs = performance.now();
    const encoder = this.#gpu.device.createCommandEncoder();
    const timestampWrites = this.#queries
      ? { querySet: this.#queries, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 }
      : undefined;
    const pass = encoder.beginComputePass({ timestampWrites });
    for (let i = 0; i < runs; i++) run(pass, i);
    pass.end();
    if (this.#queries) encoder.resolveQuerySet(this.#queries, 0, 2, this.#stamps, 0);
    const range = { buffer: this.#stamps, offset: 0, bytes: STAMPS_BYTES };
    const slot = this.#readback.copy(encoder, [range]);
    const commands = encoder.finish();
    const encodedMs = performance.now();
    this.#gpu.device.queue.submit([commands]);
    const stamps = new BigUint64Array((await this.#readback.read(slot)).buffer, 0, 2);
    const gpuMs = this.#queries
      ? Number(stamps[1] - stamps[0]) / 1e6
      : performance.now() - encodedMs;
    return { encodeMs: (encodedMs - startedMs) / runs, gpuMs: gpuMs / runs };
  }
}

/** One matrix in as many copies as make up `bytes`, multiplied with one row in turn. */
async function rotatedLinears(
  bench: Workbench,
  shape: MatrixShape,
  format: CodeGemmFormat | null,
  bytes: number,
): Promise<Run> {
  const { gpu } = bench, [n, k] = shape;
  const tensors = repeated(randomTensors("w", shape, format, 1));
  const matrix = bench.keep(await loadMatrix(gpu, tensors, "w", shape, format));
  const copies = Math.max(1, Math.ceil(bytes / matrix.bytes));
  const matrices = await gpu.allocate(
    "calibration",
    () => Array.from({ length: copies }, (_, i) => i === 0 ? matrix : copyOf(bench, matrix)),
  );
  const step = bench.keep(
    gpu.buffer("step", STEP_BYTES, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST),
  );
  gpu.write(step, 0, stepWords(ROW));
  const common = {
    gpu,
    label: "calibration",
    step,
    input: { buffer: bench.storage("calibration input", 2 * k), stride: k, offset: 0 },
    output: { buffer: bench.storage("calibration output", 4 * n), stride: n, offset: 0 },
    store: "store",
    maxRows: 1,
    scratch: bench.storage("calibration scratch", linearScratchBytes(shape, format, 1)),
    ranges: ["decode"],
    profile: { version: 1, decode: fastestDecode(FORMAT) },
  } as const;
  const linears: Linear[] = [];
  for (const matrix of matrices) {
    linears.push(bench.keep(await createLinear({ ...common, matrix })));
  }
  return (pass, i) => linears[i % copies].encode(pass, ROW, "decode");
}

/** The same weights in buffers of their own. */
function copyOf(bench: Workbench, matrix: Matrix): Matrix {
  const encoder = bench.gpu.device.createCommandEncoder();
  const copy = (buffer: GPUBuffer) => {
    const twin = bench.storage(buffer.label, buffer.size);
    encoder.copyBufferToBuffer(buffer, 0, twin, 0, buffer.size);
    return twin;
  };
  const blocks = matrix.blocks.map((block) => ({
    ...block,
    weights: copy(block.weights),
    scales: block.scales && copy(block.scales),
  }));
  bench.gpu.device.queue.submit([encoder.finish()]);
  return { ...matrix, blocks, destroy() {} };
}

/** Bytes of random numbers drawn; a large tensor repeats them. */
const DRAWN_BYTES = 256 * 1024;

/** Tensors of the same shapes whose bytes repeat the first ones: drawing them all takes too long. */
function repeated(tensors: TensorSource): TensorSource {
  const drawn = new Map<string, Promise<Uint8Array<ArrayBuffer>>>();
  const draw = ({ name, bytes }: TensorInfo) => {
    const found = drawn.get(name) ?? tensors.read(name, 0, Math.min(bytes, DRAWN_BYTES));
    drawn.set(name, found);
    return found;
  };
  return {
    names: () => tensors.names(),
    info: (name) => tensors.info(name),
    has: (name) => tensors.has(name),
    async read(name, offset, length) {
      const source = await draw(tensors.info(name));
      const bytes = new Uint8Array(length);
      for (let at = 0; at < length;) {
        const from = (offset + at) % source.length;
        const part = source.subarray(from, Math.min(source.length, from + length - at));
        bytes.set(part, at);
        at += part.length;
      }
      return bytes;
    },
  };
}

/** All of a layer but its linear layers, for one decode row at the end of a page. */
async function restOfLayer(bench: Workbench): Promise<Run> {
  const { gpu } = bench, hidden = 512;
  const shape = headShape({ heads: 8, kvHeads: 2, headDim: 64 });
  const limits = { maxRows: 1, maxSequences: 1, maxOutputs: 1, pages: 1, contextTokens: 32 };
  const width = (shape.heads + 2 * shape.kvHeads) * shape.headDim;
  const rope = { headDim: shape.headDim, theta: 10_000, scaling: null };
  const inputs = bench.keep(new StepBuffers(gpu, limits, tileRows(shape)));
  const residual = bench.storage("calibration residual", hidden * 4);
  const normed = bench.storage("calibration normed", hidden * 2);
  const attended = bench.storage("calibration attended", hidden * 2);
  const cache = {
    qkv: bench.storage("calibration qkv", width * 4),
    keys: bench.storage("calibration keys", kvPageBytes(shape)),
    values: bench.storage("calibration values", kvPageBytes(shape)),
  };
  const scratch = createDecodeScratch(gpu, shape, limits);
  bench.keep({ destroy: () => destroyDecodeScratch(scratch) });
  const angles = bench.upload("calibration angles", ropeAngles(rope, limits.contextTokens));
  const weight = bench.storage("calibration gains", hidden * 4);
  const gateUp = bench.storage("calibration gate up", 2 * hidden * 4);
  const gated = bench.storage("calibration gated", hidden * 2);
  const norm = await createRmsNorm({ gpu, hidden, epsilon: 1e-5, residual, weight, normed });
  const attention = { gpu, inputs, shape, ...cache };
  const kernels = [
    norm,
    await createRope({ ...attention, angles }),
    await createDecodeAttention({ ...attention, attended, scratch }),
    norm,
    await createSwiGlu({ gpu, inputs, width: hidden, gateUp, gated }),
  ];
  const step = inputs.write({
    sequences: [{ pages: Uint32Array.of(0) }],
    rowSequence: Uint16Array.of(0),
    rowPosition: Uint32Array.of(limits.contextTokens - 1),
    rowToken: Uint32Array.of(0),
    decodeRows: 1,
    requests: [],
  });
  return (pass) => kernels.forEach((kernel) => kernel.encode(pass, step));
}
