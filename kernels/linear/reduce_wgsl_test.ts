import { assertEquals } from "@std/assert";
import { gaussian, seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import { stepWords } from "../kernel.ts";
import type { Output } from "./output_wgsl.ts";
import { REDUCE_BINDINGS, reduceColumns, type ReduceOrder, reduceWgsl } from "./reduce_wgsl.ts";
import { stepShape } from "./rig.ts";
import type { PairFinish } from "./types.ts";
import { PARAM_BYTES, PARAM_WORDS, RANGE_CODES } from "./wgsl.ts";

const ROWS = 3, ROW_CAP = 5, ROW_BASE = 2;

/** Many splits and few, slices that are short and slices that are empty. */
const ORDERS: ReduceOrder[] = [
  { splits: 32, slices: 8 },
  { splits: 75, slices: 8 },
  { splits: 17, slices: 8 },
  { splits: 1, slices: 1 },
  { splits: 16, slices: 1 },
  { splits: 28, slices: 1 },
];

/** The sum of an output as the order says, in float32; `at` is its place in each split. */
function reference(
  partial: Float32Array,
  { splits, slices }: ReduceOrder,
  at: number,
  stride: number,
): number {
  const perSlice = Math.ceil(splits / slices);
  const sumOf = (slice: number) => {
    let sum = 0;
    for (let s = slice * perSlice; s < Math.min(splits, (slice + 1) * perSlice); s++) {
      sum = Math.fround(sum + partial[s * ROW_CAP * stride + at]);
    }
    return sum;
  };
  let total = sumOf(0);
  for (let slice = 1; slice < slices; slice++) total = Math.fround(total + sumOf(slice));
  return total;
}

/** Reduces random partial sums of `ROWS` rows from `ROW_BASE` on; the output stood full of ones. */
async function reduce(
  gpu: Gpu,
  { order, output, n, stride, yStride, yOffset }: {
    order: ReduceOrder;
    output: Output;
    n: number;
    stride: number;
    yStride: number;
    yOffset: number;
  },
) {
  const random = seededRandom(n);
  const partial = Float32Array.from(
    { length: order.splits * ROW_CAP * stride },
    () => gaussian(random),
  );
  const y = new Float32Array(yOffset + (ROW_BASE + ROWS + 1) * yStride).fill(1);
  const words: Record<string, number> = {
    n,
    y_stride: yStride,
    y_offset: yOffset,
    row_base: ROW_BASE,
    row_cap: ROW_CAP,
    partial_stride: stride,
    range: RANGE_CODES.decode,
  };
  const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
  const step = gpu.buffer("step", 16, usage);
  gpu.write(step, 0, stepWords(stepShape(ROW_BASE + ROWS)));
  const params = gpu.buffer("params", PARAM_BYTES, usage);
  gpu.write(params, 0, Uint32Array.from(PARAM_WORDS.map((word) => words[word] ?? 0)));
  const out = gpu.upload("y", y);
  const bindings = [...REDUCE_BINDINGS, ...output.finish?.bindings ?? []];
  const pipeline = await gpu.pipeline({
    label: "reduce",
    code: reduceWgsl(order, output),
    bindings,
  });
  const buffers = [step, params, gpu.upload("partial", partial), out];
  const encoder = gpu.device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  pass.setBindGroup(
    0,
    gpu.device.createBindGroup({
      layout: gpu.bindings(bindings),
      entries: [...buffers, ...output.finish?.buffers ?? []]
        .map((buffer, binding) => ({ binding, resource: { buffer } })),
    }),
  );
  pass.dispatchWorkgroups(Math.ceil(n / reduceColumns(order, output)), ROWS);
  pass.end();
  gpu.device.queue.submit([encoder.finish()]);
  return { partial, y: new Float32Array(await gpu.read(out, y.byteLength)) };
}

Deno.test("sums are added in their order bit by bit, whatever the output's stride and offset", () =>
  withGpu(async (gpu) => {
    const outputs = [
      { n: 1100, yStride: 1108, yOffset: 12, vector: true },
      { n: 139, yStride: 143, yOffset: 5, vector: false },
      { n: 3, yStride: 3, yOffset: 0, vector: false },
    ];
    const stores = ["store", "add", "add-round"] as const;
    for (const [o, order] of ORDERS.entries()) {
      for (const [i, { n, yStride, yOffset, vector }] of outputs.entries()) {
        const stride = Math.ceil(n / 256) * 256;
        const store = stores[(o + i) % stores.length];
        const at = { order, output: { store, vector }, n, stride, yStride, yOffset };
        const { partial, y } = await reduce(gpu, at);
        const expected = new Float32Array(y.length).fill(1);
        for (let row = 0; row < ROWS; row++) {
          for (let column = 0; column < n; column++) {
            const sum = reference(partial, order, row * stride + column, stride);
            const added = store === "store" ? sum : Math.fround(1 + sum);
            expected[yOffset + (ROW_BASE + row) * yStride + column] = store === "add-round"
              ? Math.f16round(added)
              : added;
          }
        }
        assertEquals(y, expected, `${JSON.stringify(order)} ${store} ${n}`);
      }
    }
  }));

Deno.test("a finish is given four pairs at a time, and each pair once", () =>
  withGpu(async (gpu) => {
    const half = 12, n = 5 * 2 * half, stride = 256;
    const finish: PairFinish = {
      half,
      bindings: [],
      buffers: [],
      code: () => /* wgsl */ `
fn finish(row: u32, n: u32, first: vec4<f32>, second: vec4<f32>) {
  put_quad(row, n, second);
  put_quad(row, n + ${half}u, first);
}
`,
    };
    for (const order of ORDERS) {
      // Added: a pair that came twice would show.
      const output = { store: "add", vector: true, finish } as const;
      const at = { order, output, n, stride, yStride: n, yOffset: 0 };
      const { partial, y } = await reduce(gpu, at);
      const expected = new Float32Array(y.length).fill(1);
      for (let row = 0; row < ROWS; row++) {
        for (let column = 0; column < n; column++) {
          const other = column % (2 * half) < half ? column + half : column - half;
          const sum = reference(partial, order, row * stride + other, stride);
          expected[(ROW_BASE + row) * n + column] = Math.fround(1 + sum);
        }
      }
      assertEquals(y, expected, JSON.stringify(order));
    }
  }));
