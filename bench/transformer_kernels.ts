/**
 * The kernels of a decode step between its linear layers: norm, RoPE, the two halves of attention,
 * SwiGLU. They read little and wait much, so each is timed as one of many dependent dispatches.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import type { Kernel } from "../kernels/kernel.ts";
import type { PassTimer } from "../kernels/pass_timer.ts";
import {
  createDecodeBatches,
  createDecodeScratch,
  createRmsNorm,
  createRope,
  createSwiGlu,
  headShape,
  kvPageBytes,
  PAGE_TOKENS,
  ropeAngles,
  StepBuffers,
  tileRows,
  type TransformerShape,
} from "../kernels/transformer/mod.ts";
import { Workbench } from "../kernels/workbench.ts";

/** What these kernels need to know of a model. */
interface LayerShape {
  hidden: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  ffn: number;
}

const SHAPES: Record<string, LayerShape> = {
  "llama-3-70b": { hidden: 8192, heads: 64, kvHeads: 8, headDim: 128, ffn: 28672 },
  "llama-3-8b": { hidden: 4096, heads: 32, kvHeads: 8, headDim: 128, ffn: 14336 },
  /** For trying the benchmark itself on a software adapter. */
  tiny: { hidden: 512, heads: 8, kvHeads: 2, headDim: 64, ffn: 1024 },
};

/** Dispatches of a kernel in one pass: the first one's start and the last one's end weigh little. */
const DISPATCHES = 32;

/** Microseconds of one kernel. */
export interface TransformerMeasurement {
  kernel: string;
  rows: number;
  contextTokens: number;
  microseconds: number;
}

/**
 * Times each kernel and prints a line per number of rows and context.
 *
 * @param cacheBytes keys and values are rotated over this much, as those of a model's layers are
 */
export async function benchTransformer(
  gpu: Gpu,
  timer: PassTimer,
  options: { shape: string; rows: number[]; contexts: number[]; cacheBytes: number },
): Promise<TransformerMeasurement[]> {
  const measurements: TransformerMeasurement[] = [];
  for (const contextTokens of options.contexts) {
    for (const rows of options.rows) {
      const bench = new Workbench(gpu);
      const layer = SHAPES[options.shape];
      const kernels = await layerKernels(bench, layer, rows, contextTokens, options.cacheBytes);
      const cells: string[] = [];
      for (const [kernel, { copies, step }] of kernels) {
        const runs = Math.ceil(DISPATCHES / copies.length) * copies.length;
        const microseconds = await timer.median((pass) => {
          for (let i = 0; i < runs; i++) copies[i % copies.length].encode(pass, step);
        }) / runs;
        measurements.push({ kernel, rows, contextTokens, microseconds });
        cells.push(`${kernel} ${microseconds.toFixed(2)}`);
      }
      gpu.check();
      bench.destroy();
      console.log(`rows ${rows}, context ${contextTokens}: us a dispatch: ${cells.join(", ")}`);
    }
  }
  return measurements;
}

/** Each kernel by its name, in copies that differ in what a model's layers differ in. */
async function layerKernels(
  bench: Workbench,
  layer: LayerShape,
  rows: number,
  contextTokens: number,
  cacheBytes: number,
): Promise<Map<string, { copies: Kernel[]; step: TransformerShape }>> {
  const { gpu } = bench;
  const { hidden, heads, kvHeads, headDim, ffn } = layer;
  const shape = headShape({ heads, kvHeads, headDim });
  const pages = Math.ceil(contextTokens / PAGE_TOKENS);
  const limits = {
    maxRows: rows,
    maxSequences: rows,
    maxOutputs: 1,
    pages: rows * pages,
    contextTokens,
  };
  const inputs = bench.keep(new StepBuffers(gpu, limits, tileRows(shape)));
  const rope = { headDim, theta: 10_000, scaling: null };
  const angles = bench.upload("angles", ropeAngles(rope, contextTokens));
  const qkv = bench.storage("qkv", rows * (heads + 2 * kvHeads) * headDim * 4);
  const attended = bench.storage("attended", rows * heads * headDim * 2);
  const residual = bench.storage("residual", rows * hidden * 4);
  const normed = bench.storage("normed", rows * hidden * 2);
  const gateUp = bench.storage("gate up", rows * 2 * ffn * 4);
  const gated = bench.storage("gated", rows * ffn * 2);
  const scratch = createDecodeScratch(gpu, shape, limits);
  [scratch.partials, ...scratch.laterBatches].forEach((buffer) => bench.keep(buffer));
  const step = inputs.write({
    sequences: Array.from({ length: rows }, (_, s) => ({
      pages: Uint32Array.from({ length: pages }, (_, i) => i * rows + s),
    })),
    rowSequence: Uint16Array.from({ length: rows }, (_, row) => row),
    rowPosition: new Uint32Array(rows).fill(contextTokens - 1),
    rowToken: new Uint32Array(rows),
    decodeRows: rows,
    requests: [],
  });

  const norms: Kernel[] = [], ropes: Kernel[] = [], splits: Kernel[] = [], joins: Kernel[] = [];
  const pageBytes = limits.pages * kvPageBytes(shape);
  const copies = Math.max(1, Math.min(DISPATCHES, Math.ceil(cacheBytes / (2 * pageBytes))));
  for (let i = 0; i < copies; i++) {
    const weight = bench.storage("gains", hidden * 4);
    const cache = {
      keys: bench.storage("keys", pageBytes),
      values: bench.storage("values", pageBytes),
    };
    norms.push(await createRmsNorm({ gpu, hidden, epsilon: 1e-5, residual, weight, normed }));
    ropes.push(await createRope({ gpu, inputs, shape, angles, qkv, ...cache }));
    const batches = await createDecodeBatches({
      gpu,
      inputs,
      shape,
      qkv,
      ...cache,
      attended,
      scratch,
    });
    splits.push(together(batches.map(({ split }) => split)));
    joins.push(together(batches.map(({ join }) => join)));
  }
  const swiglu = await createSwiGlu({ gpu, inputs, width: ffn, gateUp, gated });
  return new Map([
    ["norm", { copies: norms, step }],
    ["rope", { copies: ropes, step }],
    ["attention split", { copies: splits, step }],
    ["attention join", { copies: joins, step }],
    ["swiglu", { copies: [swiglu], step }],
  ]);
}

/** The kernel of all batches of rows. */
function together(kernels: Kernel[]): Kernel {
  return {
    label: kernels[0].label,
    encode: (pass, step) => kernels.forEach((kernel) => kernel.encode(pass, step)),
  };
}
