import { assert, assertEquals } from "@std/assert";
import { LIMITS } from "../../shared/limits.ts";
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import type { RowsView } from "../kernel.ts";
import {
  createLinear,
  linearScratchBytes,
  loadMatrix,
  type Matrix,
  type PairFinish,
} from "../linear/mod.ts";
import { randomTensors } from "../linear/random_tensors.ts";
import { bitsOf, randomActivations } from "../linear/rig.ts";
import { type DecodeChoice, defaultVariant } from "../linear/variant.ts";
import type { Batch } from "../linear/wgsl.ts";
import type { StepInputs } from "./inputs.ts";
import { headShape, kvPageBytes } from "./kv_layout.ts";
import { ropeFinish, swigluFinish } from "./pairs_wgsl.ts";
import { ropeAngles } from "./rope_angles.ts";
import { createRope, createSwiGlu, type PairRows } from "./rowwise.ts";
import { StepBuffers } from "./step_buffers.ts";

const FORMAT: CodeGemmFormat = { m: 1, v: 4, g: 64, b: 8 };
/** So many splits of K that they are summed in slices, the last two of them empty. */
const K = 64 * 18;
const ROWS = 3, PAGES = 6;
const STEP_LIMITS = {
  maxRows: ROWS,
  maxSequences: ROWS,
  maxOutputs: 1,
  pages: PAGES,
  contextTokens: 2 * LIMITS.pageTokens,
};

/** Decode rows of a sequence each, at positions of the first page and of the second. */
function decodeRows() {
  return {
    sequences: [[3, 1], [0, 5], [2, 4]].map((pages) => ({ pages: Uint32Array.from(pages) })),
    rowSequence: Uint16Array.of(2, 0, 1),
    rowPosition: Uint32Array.of(7, LIMITS.pageTokens + 3, LIMITS.pageTokens),
    rowToken: new Uint32Array(ROWS),
    decodeRows: ROWS,
    requests: [],
  };
}

interface Layer {
  finish: PairFinish;
  /** The kernel of its own, over what the layer stored. */
  own(rows: PairRows): ReturnType<typeof createRope>;
  /** What pairs become, and how many bytes of it count. */
  results: GPUBuffer[];
}

/**
 * Random decode rows through a linear layer of `n` outputs and what is behind it.
 *
 * @param batch null: stored, then a kernel of its own
 * @returns the bits of all results, whether the layer finished its rows, and in how many dispatches
 */
async function run(
  gpu: Gpu,
  { n, batch, make, choice }: {
    n: number;
    batch: Batch | null;
    make(inputs: StepInputs, output: GPUBuffer): Layer;
    choice?: DecodeChoice;
  },
) {
  const matrix: Matrix = await loadMatrix(
    gpu,
    randomTensors("w", [n, K], FORMAT, 5),
    "w",
    [n, K],
    FORMAT,
  );
  const inputs = new StepBuffers(gpu, STEP_LIMITS, 16);
  const shape = inputs.write(decodeRows());
  const output: RowsView = { buffer: gpu.storage("y", ROWS * n * 4), stride: n, offset: 0 };
  const layer = make(inputs, output.buffer);
  const linear = await createLinear({
    gpu,
    label: "pairs",
    matrix,
    step: inputs.step,
    input: {
      buffer: gpu.upload("x", bitsOf(randomActivations(ROWS * K, 4))),
      stride: K,
      offset: 0,
    },
    output,
    store: "store",
    maxRows: ROWS,
    scratch: gpu.storage("scratch", linearScratchBytes([n, K], FORMAT, ROWS, matrix.order)),
    finish: batch === null ? undefined : layer.finish,
    ranges: ["decode"],
    profile: { version: 1, decode: "dequantize" },
    variant: { ...defaultVariant(false), decode: { turnK: 16, ...choice }, batches: [batch ?? 1] },
  });
  const own = await layer.own(linear.finishes ? "prefill" : "all");
  const encoder = gpu.device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  let dispatches = 0;
  const dispatch = pass.dispatchWorkgroups.bind(pass);
  pass.dispatchWorkgroups = (...counts) => {
    dispatches++;
    dispatch(...counts);
  };
  linear.encode(pass, shape, "decode");
  const ofLayer = dispatches;
  own.encode(pass, shape);
  pass.end();
  gpu.device.queue.submit([encoder.finish()]);
  const bits: Uint16Array[] = [];
  for (const buffer of layer.results) {
    bits.push(new Uint16Array(await gpu.read(buffer, buffer.size)));
  }
  gpu.check();
  linear.destroy();
  matrix.destroy();
  return { bits, finishes: linear.finishes, dispatches: ofLayer };
}

/** RoPE behind a projection to q | k | v; the queries of `output` count, all else of it is cleared. */
function ropeLayer(gpu: Gpu, heads: number, kvHeads: number, headDim: number) {
  const shape = headShape({ heads, kvHeads, headDim });
  const n = (heads + 2 * kvHeads) * headDim;
  const make = (inputs: StepInputs, qkv: GPUBuffer): Layer => {
    const keys = gpu.storage("keys", PAGES * kvPageBytes(shape));
    const values = gpu.storage("values", PAGES * kvPageBytes(shape));
    const rope = { headDim, theta: 10_000, scaling: null };
    const angles = gpu.upload("angles", ropeAngles(rope, STEP_LIMITS.contextTokens));
    const buffers = { angles, keys, values };
    return {
      finish: ropeFinish(shape, inputs, buffers),
      own: (rows) => createRope({ gpu, inputs, shape, qkv, ...buffers, rows }),
      results: [keys, values, qkv],
    };
  };
  /** Keys and values that are stored beside are nothing that anyone reads. */
  const queries = ([keys, values, qkv]: Uint16Array[]) => [
    keys,
    values,
    ...Array.from(
      { length: ROWS },
      (_, row) => qkv.slice(row * n * 2, (row * n + heads * headDim) * 2),
    ),
  ];
  return { n, make, queries };
}

for (const limits of ["adapter", "default"] as const) {
  Deno.test(`RoPE in the linear layer has the bits of RoPE behind it, at the limits: ${limits}`, () =>
    withGpu(async (gpu) => {
      // Heads that workgroups of whole sums divide into, heads that they do not, many and one.
      for (const [heads, kvHeads, headDim] of [[5, 1, 64], [3, 3, 24], [2, 1, 128]]) {
        const { n, make, queries } = ropeLayer(gpu, heads, kvHeads, headDim);
        const stored = await run(gpu, { n, batch: null, make });
        assert(!stored.finishes);
        for (const result of queries(stored.bits)) assert(result.some((word) => word !== 0));
        for (const batch of [1, 2, 4, 8] as const) {
          const finished = await run(gpu, { n, batch, make });
          assert(finished.finishes);
          const what = `heads of ${headDim} x${batch}`;
          assertEquals(queries(finished.bits), queries(stored.bits), what);
          // Workgroups of whole sums have 96 columns: four heads of 24, and bindings for their cache.
          const inKernel = limits === "adapter" && batch <= 2 && headDim === 24;
          assertEquals(finished.dispatches, inKernel ? 1 : 2, what);
        }
      }
    }, limits));
}

Deno.test("a chosen shape whose workgroups cut heads gives way to one that finishes them", () =>
  withGpu(async (gpu) => {
    const { n, make, queries } = ropeLayer(gpu, 3, 3, 24);
    const usual = await run(gpu, { n, batch: 1, make });
    const chosen = await run(gpu, { n, batch: 1, make, choice: { codeThreads: 18 * 8 } });
    assertEquals([usual.dispatches, chosen.dispatches], [1, 1]);
    assertEquals(queries(chosen.bits), queries(usual.bits));
  }, "adapter"));

Deno.test("SwiGLU in the linear layer has the bits of SwiGLU behind it", () =>
  withGpu(async (gpu) => {
    const width = 172, n = 2 * width;
    const make = (inputs: StepInputs, gateUp: GPUBuffer): Layer => {
      const gated = gpu.storage("gated", ROWS * width * 2);
      return {
        finish: swigluFinish(width, gated),
        own: (rows) => createSwiGlu({ gpu, inputs, width, gateUp, gated, rows }),
        results: [gated],
      };
    };
    const stored = await run(gpu, { n, batch: null, make });
    assert(stored.bits[0].some((word) => word !== 0));
    for (const batch of [1, 4] as const) {
      const finished = await run(gpu, { n, batch, make });
      assert(finished.finishes);
      assertEquals(finished.bits, stored.bits);
    }
  }));

Deno.test("pairs that do not come by fours are left to the kernels behind", () =>
  withGpu(async (gpu) => {
    const rope = ropeLayer(gpu, 3, 1, 10);
    const { finishes, bits } = await run(gpu, { n: rope.n, batch: 1, make: rope.make });
    assert(!finishes);
    const stored = await run(gpu, { n: rope.n, batch: null, make: rope.make });
    assertEquals(bits, stored.bits);
  }));
