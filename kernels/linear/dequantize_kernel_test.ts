import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import { decodeCases, formatOf, ROOMS } from "./decode_fixture.ts";
import { dequantizeBytes, type DequantizeKernel, dequantizeKernel } from "./dequantize_kernel.ts";
import { loadMatrix, loadStack } from "./matrix.ts";
import { codeOrder, roundUp } from "./order.ts";
import { randomTensors } from "./random_tensors.ts";
import { dequantizeProduct, readCodeTensors } from "./reference.ts";
import { bitsOf, randomActivations, runLinear, stepShape } from "./rig.ts";
import type { MatrixShape } from "./types.ts";
import { type DecodeChoice, defaultVariant } from "./variant.ts";
import { type Batch, BATCHES } from "./wgsl.ts";
import {
  holdsPairs,
  holdsWholeSums,
  shareColumns,
  shareThreads,
  splitPositions,
} from "./workgroup_share.ts";

const GPU_VARIANT = defaultVariant(false);

function* kernels(): Generator<{ kernel: DequantizeKernel; members: number[]; room: number }> {
  const formats = ["m1v4g128", "m2v8g128", "m2v4g128", "m1v8g64"];
  for (const { format, order, batch, limits, members, room, name } of decodeCases(formats)) {
    const kernel = dequantizeKernel(format, order, batch, GPU_VARIANT, limits);
    assert(kernel !== null, `${name} have a kernel`);
    yield { kernel, members, room };
  }
}

Deno.test("a kernel keeps within the adapter's threads and workgroup memory", () => {
  for (const { kernel, room } of kernels()) {
    assert(shareThreads(kernel) <= ROOMS[room].maxThreads);
    assert(dequantizeBytes(kernel) <= ROOMS[room].workgroupBytes);
  }
});

Deno.test("workgroups share out splits and turns evenly, and none straddles two matrices of a stack", () => {
  for (const { kernel, members } of kernels()) {
    const { order, splits, turnPositions } = kernel;
    assertEquals(order.dequantize.splits % splits, 0);
    const { units, splitUnits } = order.dequantize;
    const last = units - (order.dequantize.splits - 1) * splitUnits;
    assert(last > 0);
    assertEquals(splitPositions(order) % turnPositions, 0);
    assertEquals(last * order.dequantize.unitPositions % turnPositions, 0);
    if (members.length === 1) continue;
    for (const rows of members) assertEquals(rows % shareColumns(kernel), 0);
  }
});

Deno.test("one row's workgroups have whole sums at Llama's shapes, eight rows' share out K", () => {
  for (const { kernel, members } of kernels()) {
    if (members[0] < 4096) continue;
    if (kernel.batch <= 2) assert(holdsWholeSums(kernel));
    if (kernel.batch >= 8) assert(!holdsWholeSums(kernel));
  }
});

Deno.test("of Llama-3 70B's q | k | v, one and two rows' workgroups have whole heads of 128", () => {
  let whole = 0;
  for (const { kernel, members, room } of kernels()) {
    if (members[0] !== 8192 || members.length === 1 || ROOMS[room].maxThreads < 1024) continue;
    assertEquals(holdsPairs(kernel, 64), kernel.batch <= 2);
    if (kernel.batch <= 2) whole++;
  }
  assert(whole > 0);
});

Deno.test("a workgroup holds no more activations, and has no more threads, than leave room for others", () => {
  const room = { members: [16384], bindingRows: 16384, ...ROOMS[0] };
  // Splits far longer than a workgroup holds activations of.
  const format = formatOf("m1v4g128");
  const order = codeOrder([16384, 65536], format);
  const heldK = BATCHES.filter((batch) => batch >= 4).map((batch) => {
    const kernel = dequantizeKernel(format, order, batch, GPU_VARIANT, room)!;
    return kernel.splits * kernel.inputTurns * kernel.turnPositions * format.v;
  });
  assertEquals(heldK, [1024, 128, 128]);
  // Tables that leave room for a single workgroup.
  for (const name of ["m4v8g128", "m1v32g128"]) {
    const format = formatOf(name);
    const order = codeOrder([16384, 8192], format);
    for (const batch of [8, 16] as const) {
      const kernel = dequantizeKernel(format, order, batch, GPU_VARIANT, room)!;
      assertEquals(shareThreads(kernel), 512, `${name} x${batch}`);
    }
  }
});

Deno.test("codes and vectors that the kernel is not for have none", () => {
  for (const name of ["m1v8b16", "m1v4g128b12", "m2v6g12", "m1v2g128"]) {
    const format = formatOf(name);
    const room = { members: [256], bindingRows: 256, ...ROOMS[0] };
    const order = codeOrder([256, 768], format);
    assertEquals(dequantizeKernel(format, order, 1, GPU_VARIANT, room), null);
  }
});

/** Rows of a random matrix, decoded in the given batch, in chunks of as many as the scratch holds. */
async function decode(
  gpu: Gpu,
  { shape, name, batch, choice, rows = 3, scratchRows = 16 }: {
    shape: MatrixShape;
    name: string;
    batch: Batch;
    choice?: DecodeChoice;
    rows?: number;
    scratchRows?: number;
  },
): Promise<Float32Array> {
  const format = formatOf(name);
  const matrix = await loadMatrix(gpu, randomTensors("w", shape, format, 9), "w", shape, format);
  const { dequantize, rowBlock } = codeOrder(shape, format);
  const y = await runLinear(gpu, {
    matrix,
    x: bitsOf(randomActivations(rows * shape[1], 4)),
    shape: stepShape(rows),
    ranges: ["decode"],
    scratchBytes: scratchRows * dequantize.splits * roundUp(shape[0], rowBlock) * 4,
    profile: "dequantize",
    variant: { ...GPU_VARIANT, batches: [batch], decode: { turnK: 16, ...choice } },
  });
  matrix.destroy();
  return y;
}

Deno.test("whole sums and partial ones have the same bits, and follow the reference", () =>
  withGpu(async (gpu) => {
    // More than 16 splits, summed in slices, the last one shorter; N that no workgroup divides.
    const shape: MatrixShape = [76, 64 * 67];
    const name = "m1v4g64";
    const format = formatOf(name);
    const order = codeOrder(shape, format);
    assert(order.dequantize.slices > 1 && order.dequantize.units % order.dequantize.splits !== 0);
    const codes = await readCodeTensors(randomTensors("w", shape, format, 9), "w", shape, format);
    const x = randomActivations(3 * shape[1], 4);
    const expected = new Float32Array(3 * shape[0]);
    for (let row = 0; row < 3; row++) {
      const input = x.subarray(row * shape[1], (row + 1) * shape[1]);
      expected.set(dequantizeProduct(codes, order, input), row * shape[0]);
    }
    const alone = await decode(gpu, { shape, name, batch: 1 });
    // Outputs are about 1; adapters may round a float16 multiply-add twice.
    alone.forEach((value, i) => assertAlmostEquals(value, expected[i], 4e-3, `output ${i}`));
    for (const batch of [2, 4, 8, 16] as const) {
      const y = await decode(gpu, { shape, name, batch });
      assertEquals(new Uint32Array(y.buffer), new Uint32Array(alone.buffer), `x${batch}`);
    }
  }, "adapter"));

Deno.test("vectors of any length and many codebooks have the same bits in every batch, and follow the reference", () =>
  withGpu(async (gpu) => {
    // Groups that end within 32 of K, vectors that are closed in between, codebooks that are added.
    const cases: [name: string, shape: MatrixShape, batches: Batch[]][] = [
      ["m3v12g48", [41, 240], [4]],
      ["m1v20g20", [13, 160], [4]],
      ["m1v36g36", [9, 144], []],
    ];
    for (const [name, shape, batches] of cases) {
      const format = formatOf(name);
      const codes = await readCodeTensors(randomTensors("w", shape, format, 9), "w", shape, format);
      const x = randomActivations(3 * shape[1], 4).subarray(0, shape[1]);
      const expected = dequantizeProduct(codes, codeOrder(shape, format), x);
      const alone = await decode(gpu, { shape, name, batch: 1 });
      expected.forEach((value, i) => assertAlmostEquals(alone[i], value, 4e-3, `${name} ${i}`));
      for (const batch of batches) {
        const y = await decode(gpu, { shape, name, batch });
        assertEquals(new Uint32Array(y.buffer), new Uint32Array(alone.buffer), `${name} x${batch}`);
      }
    }
  }, "adapter"));

Deno.test("a stack that is cut into bindings has the bits of a whole one: no workgroup takes two matrices", () =>
  withGpu(async (gpu) => {
    const format = formatOf("m1v4g64");
    const k = 512, n = 1792; // a workgroup's 224 rows divide n, but not what a binding holds
    const sources = ["a", "b"].map((name, i) => randomTensors(name, [n, k], format, i));
    const tensors = {
      ...sources[0],
      has: (name: string) => sources.some((source) => source.has(name)),
      info: (name: string) => sources.find((source) => source.has(name))!.info(name),
      read: (name: string, offset: number, length: number) =>
        sources.find((source) => source.has(name))!.read(name, offset, length),
    };
    const run = async (options: { maxBindingBytes?: number }) => {
      const members = ["a", "b"].map((name) => ({ name, n }));
      const matrix = await loadStack(gpu, tensors, "ab", members, k, format, options);
      const y = await runLinear(gpu, {
        matrix,
        x: bitsOf(randomActivations(k, 4)),
        shape: stepShape(1),
        ranges: ["decode"],
        profile: "dequantize",
        variant: { ...GPU_VARIANT, batches: [1] },
      });
      const blocks = matrix.blocks.length;
      matrix.destroy();
      return { y, blocks };
    };
    const whole = await run({});
    const cut = await run({ maxBindingBytes: 5 * 256 * (k / 16) * 4 });
    assertEquals([whole.blocks, cut.blocks], [1, 3]);
    assertEquals(cut.y, whole.y);
  }, "adapter"));

Deno.test("rows beyond what the scratch holds are decoded behind the others, with the same bits", () =>
  withGpu(async (gpu) => {
    // Of so many splits, a workgroup of four rows takes one: they meet in the scratch.
    const at = { shape: [76, 64 * 67] as const, name: "m1v4g64", batch: 4, rows: 7 } as const;
    assertEquals(await decode(gpu, { ...at, scratchRows: 4 }), await decode(gpu, at));
  }, "adapter"));

Deno.test("threads, rows of N, prefetching and turns change no bit", () =>
  withGpu(async (gpu) => {
    const random = seededRandom(3);
    const shape: MatrixShape = [132, 512];
    for (const name of ["m1v4g128", "m2v8g128"]) {
      const standard = await decode(gpu, { shape, name, batch: 2 });
      for (const codeThreads of [64, 256]) {
        const choice: DecodeChoice = {
          codeThreads,
          codeRowsPerThread: random() < 0.5 ? 4 : 8,
          prefetch: codeThreads === 64,
        };
        const y = await decode(gpu, { shape, name, batch: 2, choice });
        assertEquals(y, standard, `${name} ${JSON.stringify(choice)}`);
      }
    }
  }, "adapter"));
