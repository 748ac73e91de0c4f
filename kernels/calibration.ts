/**
 * How fast this GPU decodes, measured when a worker joins: the planner places layers by it.
 *
 * Decode reads every weight once per step, so a matrix costs its bytes over a rate. The rate is the
 * slope between a large and a tiny matrix, run by the real kernels over rotated copies that together
 * exceed a GPU's last cache; what the tiny ones cost, with the rest of a layer, is the overhead.
 *
 * @module
 */
import {
  bitsPerWeight,
  type CodeGemmFormat,
  type TensorInfo,
  type TensorSource,
} from "../shared/model_config.ts";
import type { WorkerCard } from "../shared/protocol.ts";
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
  shape: MatrixShape;
  /** Of all copies of a matrix together. */
  rotatedBytes: number;
  /** Of one measurement. */
  leastMs: number;
}

/** Last caches of GPUs go up to about 128 MiB; 4096 x 4096 is a matrix of an 8B model. */
const HARDWARE: Scale = { shape: [4096, 4096], rotatedBytes: 160 * 2 ** 20, leastMs: 2 };
const SOFTWARE: Scale = { shape: [512, 512], rotatedBytes: 2 ** 20, leastMs: 5 };

const FORMAT: CodeGemmFormat = { m: 1, v: 4, g: 128, b: 8 };
const TINY: MatrixShape = [128, 128];
const LINEARS_PER_LAYER = 7;
const ROW: StepShape = { decodeRows: 1, rows: 1, outputs: 0, contextTokens: 1 };
/** Runs of one submit at most. */
const MAX_RUNS = 4096;
const MEASUREMENTS = 3;

/**
 * Measures for some tens of milliseconds (longer on a software adapter).
 *
 * @throws FleetError `gpu` when the device fails, `out-of-memory`
 */
export async function calibrate(gpu: Gpu): Promise<WorkerCard["calibration"]> {
  const scale = gpu.info.software ? SOFTWARE : HARDWARE;
  const bench = new Workbench(gpu);
  const readback = bench.keep(await Readback.create(gpu, 4));
  const time = (run: Run) => measureMs(gpu, readback, scale, run);
  try {
    const dense = await time(await rotatedLinears(bench, scale.shape, null, scale.rotatedBytes));
    const denseTiny = await time(await rotatedLinears(bench, TINY, null, 0));
    const codes = await time(await rotatedLinears(bench, scale.shape, FORMAT, scale.rotatedBytes));
    const codesTiny = await time(await rotatedLinears(bench, TINY, FORMAT, 0));
    const others = await time(await restOfLayer(bench));
    return {
      denseBytesPerMs: slope(scale.shape, null, dense, denseTiny),
      codegemmBytesPerMs: slope(scale.shape, FORMAT, codes, codesTiny),
      overheadMsPerLayer: LINEARS_PER_LAYER * codesTiny + others,
    };
  } finally {
    bench.destroy();
  }
}

/** Encodes the i-th run; its last write goes to `output`. */
interface Run {
  output: GPUBuffer;
  encode(pass: GPUComputePassEncoder, i: number): void;
}

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

/** The best time of a run, over submits of as many as take `leastMs`. */
async function measureMs(
  gpu: Gpu,
  readback: Readback,
  { leastMs }: Scale,
  run: Run,
): Promise<number> {
  const submit = async (runs: number) => {
    const startedMs = performance.now();
    const encoder = gpu.device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    for (let i = 0; i < runs; i++) run.encode(pass, i);
    pass.end();
    const slot = readback.copy(encoder, [{ buffer: run.output, offset: 0, bytes: 4 }]);
    gpu.device.queue.submit([encoder.finish()]);
    await readback.read(slot);
    return performance.now() - startedMs;
  };
  await submit(1);
  let runs = 1, ms = await submit(runs);
  while (ms < leastMs && runs < MAX_RUNS) {
    runs *= 2;
    ms = await submit(runs);
  }
  for (let i = 1; i < MEASUREMENTS; i++) ms = Math.min(ms, await submit(runs));
  return ms / runs;
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
  const output = bench.storage("calibration output", 4 * n);
  const common = {
    gpu,
    label: "calibration",
    step,
    input: { buffer: bench.storage("calibration input", 2 * k), stride: k, offset: 0 },
    output: { buffer: output, stride: n, offset: 0 },
    store: "store",
    maxRows: 1,
    scratch: bench.storage("calibration scratch", linearScratchBytes(shape, format, 1)),
    ranges: ["decode"],
    profile: { version: 1, decode: "codegemm" },
  } as const;
  const linears: Linear[] = [];
  for (const matrix of matrices) {
    linears.push(bench.keep(await createLinear({ ...common, matrix })));
  }
  return { output, encode: (pass, i) => linears[i % copies].encode(pass, ROW, "decode") };
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
  return {
    output: gated,
    encode: (pass) => kernels.forEach((kernel) => kernel.encode(pass, step)),
  };
}
