import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import { decodeCases, formatOf, ROOMS } from "./decode_fixture.ts";
import { int8Bytes, type Int8Kernel, int8Kernel, splitTurns } from "./int8_kernel.ts";
import { loadMatrix, loadStack } from "./matrix.ts";
import { codeOrder, roundUp } from "./order.ts";
import { randomTensors } from "./random_tensors.ts";
import { int8Product, readCodeTensors } from "./reference.ts";
import { bitsOf, randomActivations, runLinear, stepShape } from "./rig.ts";
import type { MatrixShape } from "./types.ts";
import { type DecodeChoice, defaultVariant } from "./variant.ts";
import type { Batch } from "./wgsl.ts";
import { holdsPairs, shareColumns, shareThreads } from "./workgroup_share.ts";

const GPU_VARIANT = defaultVariant(false);

function* kernels(): Generator<{ kernel: Int8Kernel; members: number[]; room: number }> {
  const formats = ["m1v4g128", "m2v8g128", "m2v4g128", "m1v8g64", "m1v32g128"];
  for (const { format, order, batch, limits, members, room, name } of decodeCases(formats)) {
    const kernel = int8Kernel(format, order, batch, {}, limits);
    assert(kernel !== null, `${name} have a kernel`);
    yield { kernel, members, room };
  }
}

Deno.test("an int8 kernel keeps within the adapter's threads and workgroup memory", () => {
  for (const { kernel, room } of kernels()) {
    assert(shareThreads(kernel) <= ROOMS[room].maxThreads);
    assert(int8Bytes(kernel) <= ROOMS[room].workgroupBytes);
  }
});

Deno.test("int8 workgroups take whole turns of whole groups, and rows of one matrix of a stack", () => {
  for (const { kernel, members } of kernels()) {
    const { order: { dequantize }, splits, turnPositions, groupPositions, format } = kernel;
    assertEquals(dequantize.splits % splits, 0);
    assertEquals(turnPositions % groupPositions, 0);
    assertEquals(groupPositions * format.v % 16, 0);
    assert(Number.isInteger(splitTurns(kernel)));
    const last = dequantize.units - (dequantize.splits - 1) * dequantize.splitUnits;
    assertEquals(last * dequantize.unitPositions % turnPositions, 0);
    if (members.length === 1) continue;
    for (const rows of members) assertEquals(rows % shareColumns(kernel), 0);
  }
});

Deno.test("of Llama-3 70B's q | k | v, int8 workgroups of one and two rows have whole heads of 128", () => {
  let whole = 0;
  for (const { kernel, members, room } of kernels()) {
    if (kernel.format.v > 8) continue;
    if (members[0] !== 8192 || members.length === 1 || ROOMS[room].maxThreads < 1024) continue;
    assertEquals(holdsPairs(kernel, 64), kernel.batch <= 2);
    if (kernel.batch <= 2) whole++;
  }
  assert(whole > 0);
});

Deno.test("codes whose groups fill no words, and codebooks too large for a workgroup, are not for int8", () => {
  for (const name of ["m1v8b16", "m2v6g12", "m1v2g128", "m1v12g24", "m3v16g128", "m1v4g8"]) {
    assertEquals(codeOrder([256, 768], formatOf(name)).int8Positions, null, name);
  }
});

/** Rows of a random matrix, decoded in the given batch. */
async function decode(
  gpu: Gpu,
  { shape, name, batch, x, choice, scratchRows = 16 }: {
    shape: MatrixShape;
    name: string;
    batch: Batch;
    x: Float16Array<ArrayBuffer>;
    choice?: DecodeChoice;
    scratchRows?: number;
  },
): Promise<Float32Array> {
  const format = formatOf(name);
  const matrix = await loadMatrix(gpu, randomTensors("w", shape, format, 9), "w", shape, format);
  const { dequantize, rowBlock } = codeOrder(shape, format);
  const y = await runLinear(gpu, {
    matrix,
    x: bitsOf(x),
    shape: stepShape(x.length / shape[1]),
    ranges: ["decode"],
    scratchBytes: scratchRows * dequantize.splits * roundUp(shape[0], rowBlock) * 4,
    profile: "int8",
    variant: { ...GPU_VARIANT, batches: [batch], decode: choice },
  });
  matrix.destroy();
  return y;
}

Deno.test("int8 rows have the same bits in every batch, and those of the reference but for float32 rounding", () =>
  withGpu(async (gpu) => {
    const cases: [name: string, shape: MatrixShape, batches: Batch[]][] = [
      // More than 16 splits, summed in slices, the last one shorter; N that no workgroup divides.
      ["m1v4g64", [76, 64 * 67], [2, 4, 8, 16]],
      // Codebooks that are added; groups of less than 64; several groups of a word.
      ["m2v8g128", [41, 1280], [2, 16]],
      ["m2v4g16", [13, 160], [4]],
      ["m1v32g32", [9, 768], [8]],
      ["m1v12g48", [9, 2304], [4]],
    ];
    for (const [name, shape, batches] of cases) {
      const format = formatOf(name);
      const order = codeOrder(shape, format);
      const codes = await readCodeTensors(randomTensors("w", shape, format, 9), "w", shape, format);
      const x = randomActivations(3 * shape[1], 4);
      // Rows of unlike magnitude, and within one groups of zeros.
      x.forEach((value, i) => x[i] = value * 10 ** (Math.floor(i / shape[1]) - 1));
      x.fill(0, shape[1], shape[1] + 128);
      const alone = await decode(gpu, { shape, name, batch: 1, x });
      for (let row = 0; row < 3; row++) {
        const expected = int8Product(
          codes,
          order,
          x.subarray(row * shape[1], (row + 1) * shape[1]),
        );
        const size = Math.max(...expected.map(Math.abs));
        expected.forEach((value, n) => {
          const got = alone[row * shape[0] + n];
          assertAlmostEquals(got, value, 1e-5 * size, `${name} row ${row}, output ${n}`);
        });
      }
      for (const batch of batches) {
        const y = await decode(gpu, { shape, name, batch, x });
        assertEquals(new Uint32Array(y.buffer), new Uint32Array(alone.buffer), `${name} x${batch}`);
      }
    }
  }, "adapter"));

Deno.test("what is not a number shows in every output of its row, and in no other's", () =>
  withGpu(async (gpu) => {
    const shape: MatrixShape = [36, 256];
    const x = randomActivations(3 * shape[1], 4);
    x[shape[1] + 100] = NaN;
    for (const batch of [1, 4] as const) {
      const y = await decode(gpu, { shape, name: "m1v4g128", batch, x });
      y.forEach((value, i) => {
        assertEquals(Number.isNaN(value), Math.floor(i / shape[0]) === 1, `output ${i}, x${batch}`);
      });
    }
  }, "adapter"));

Deno.test("threads, rows of N, prefetching and turns change no bit of int8 rows", () =>
  withGpu(async (gpu) => {
    const shape: MatrixShape = [132, 1024];
    const x = randomActivations(2 * shape[1], 4);
    for (const [name, batch] of [["m1v4g128", 2], ["m1v4g128", 8], ["m2v8g128", 2]] as const) {
      const standard = await decode(gpu, { shape, name, batch, x });
      const choices: DecodeChoice[] = [
        { codeThreads: 64, prefetch: true },
        { codeThreads: 256, codeRowsPerThread: 8, prefetch: false },
        { turnK: 128 },
      ];
      for (const choice of choices) {
        const y = await decode(gpu, { shape, name, batch, x, choice });
        assertEquals(y, standard, `${name} x${batch} ${JSON.stringify(choice)}`);
      }
    }
  }, "adapter"));

Deno.test("in WebGPU's default limits int8 rows have the bits that they have in the adapter's", async () => {
  // So much K that its activations do not fit at once.
  const at = { shape: [70, 12288] as const, name: "m1v4g128", batch: 1 } as const;
  const x = randomActivations(12288, 4);
  const results: Float32Array[] = [];
  for (const limits of ["adapter", "default"] as const) {
    await withGpu(async (gpu) => void results.push(await decode(gpu, { ...at, x })), limits);
  }
  assertEquals(results[1], results[0]);
});

Deno.test("each matrix of a stack has a scale of its own for its centroids", () =>
  withGpu(async (gpu) => {
    const format = formatOf("m1v4g64");
    const k = 512, n = 256;
    const sources = ["a", "b"].map((name, i) => randomTensors(name, [n, k], format, i));
    const tensors = {
      ...sources[0],
      has: (name: string) => sources.some((source) => source.has(name)),
      info: (name: string) => sources.find((source) => source.has(name))!.info(name),
      read: (name: string, offset: number, length: number) =>
        sources.find((source) => source.has(name))!.read(name, offset, length),
    };
    const x = randomActivations(k, 4);
    const members = ["a", "b"].map((name) => ({ name, n }));
    const matrix = await loadStack(gpu, tensors, "ab", members, k, format);
    const stacked = await runLinear(gpu, {
      matrix,
      x: bitsOf(x),
      shape: stepShape(1),
      ranges: ["decode"],
      profile: "int8",
      variant: { ...GPU_VARIANT, batches: [1] },
    });
    matrix.destroy();
    for (const [i, name] of ["a", "b"].entries()) {
      const codes = await readCodeTensors(tensors, name, [n, k], format);
      const expected = int8Product(codes, codeOrder([n, k], format), x);
      expected.forEach((value, row) => assertAlmostEquals(stacked[i * n + row], value, 1e-4));
    }
  }, "adapter"));
