import { assert, assertEquals } from "@std/assert";
import { type CodeGemmFormat, matrixFormat } from "../../shared/model_config.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import { formatOf, ROOMS, SHAPES, total } from "./decode_fixture.ts";
import { loadMatrix, loadStack } from "./matrix.ts";
import { codeOrder, psumbookColumns } from "./order.ts";
import {
  psumbookBytes,
  type PsumbookKernel,
  psumbookKernel,
  stageRounds,
  threadCodebooks,
  threadEntries,
  workgroupColumns,
} from "./psumbook_kernel.ts";
import { randomTensors } from "./random_tensors.ts";
import { codegemmProduct, readCodeTensors } from "./reference.ts";
import { bitsOf, randomActivations, runLinear, stepShape } from "./rig.ts";
import type { Matrix, MatrixShape } from "./types.ts";
import { type DecodeChoice, defaultVariant, type Variant } from "./variant.ts";

const GPU_VARIANT = defaultVariant(false);
const BATCHES = [1, 2, 4] as const;

function* kernels(): Generator<{ kernel: PsumbookKernel; members: number[]; room: number }> {
  for (const name of ["m1v4g128", "m2v8g128", "m8v8g128", "m3v4g32", "m1v64g128"]) {
    for (const [members, k] of SHAPES) {
      if (k % 256 !== 0 && name === "m1v64g128") continue;
      const n = total(members);
      const format = matrixFormat(formatOf(name), k);
      const order = codeOrder([n, k], format, undefined, members);
      for (const [room, limits] of ROOMS.entries()) {
        for (const batch of BATCHES) {
          const given = { members, bindingRows: n, ...limits };
          const kernel = psumbookKernel(format, order, batch, {}, given, true);
          assert(kernel !== null, `${name} ${members} x ${k} has a kernel for ${batch} rows`);
          yield { kernel, members, room };
        }
      }
    }
  }
}

Deno.test("a kernel keeps within the adapter's threads and workgroup memory", () => {
  for (const { kernel, room } of kernels()) {
    assert(kernel.threads <= ROOMS[room].maxThreads);
    assert(psumbookBytes(kernel) <= ROOMS[room].workgroupBytes);
  }
});

Deno.test("teams share out entries and codebooks evenly, and stages the Psumbooks of a turn", () => {
  for (const { kernel } of kernels()) {
    const { format: { m }, order, teams, stageBooks, turnPositions } = kernel;
    assertEquals(Number.isInteger(threadEntries(kernel)), true);
    assertEquals(Number.isInteger(threadCodebooks(kernel)), true);
    // A stage begins with the first codebook that a team has.
    assertEquals(stageBooks % Math.min(teams, m), 0);
    assert(stageRounds(kernel) * teams >= stageBooks);
    assertEquals(order.unitPositions % turnPositions, 0);
  }
});

Deno.test("splits are of whole units, and every multiprocessor of an H200 has one tall workgroup", () => {
  const workgroups = (members: number[], k: number, format: CodeGemmFormat) => {
    const order = codeOrder([total(members), k], format, undefined, members);
    const { units, splitUnits, splits, unitPositions, groupPositions } = order;
    assertEquals(units * unitPositions * format.v, k);
    assertEquals(unitPositions % groupPositions, 0);
    assert((splits - 1) * splitUnits < units && units <= splits * splitUnits);
    return splits * Math.ceil(total(members) / psumbookColumns(members));
  };
  for (const name of ["m1v4g128", "m2v8g128"]) {
    const counts = SHAPES.slice(0, 4).map(([members, k]) => workgroups(members, k, formatOf(name)));
    // The stack of q, k and v has workgroups of 1024 rows, four of them on a multiprocessor.
    assertEquals(counts, [520, 126, 128, 128]);
    for (const [members, k] of SHAPES) workgroups(members, k, formatOf(name));
  }
});

Deno.test("Llama's shapes have the workgroups that were measured", () => {
  for (const { kernel, members, room } of kernels()) {
    if (room !== 0 || kernel.format.m > 2 || kernel.format.v > 8) continue;
    const { threads, rowsPerThread, teams, stageBooks, inputTurns, order } = kernel;
    if (members[0] === 28672 || (members[0] === 8192 && members.length === 1)) {
      assertEquals({ threads, rowsPerThread, teams }, {
        threads: 1024,
        rowsPerThread: 4,
        teams: 4,
      });
    } else if (members[0] === 8192) {
      assertEquals({ threads, rowsPerThread, teams }, { threads: 128, rowsPerThread: 8, teams: 2 });
    } else continue;
    // Two stages a turn, and the activations of a whole split.
    assertEquals([stageBooks, inputTurns], [4, order.splitUnits]);
  }
});

Deno.test("no workgroup takes rows of two matrices of a stack, wherever it is cut into bindings", () => {
  const format = formatOf("m2v8g128");
  for (const [members, k] of SHAPES) {
    if (members.length === 1) continue;
    const order = codeOrder([total(members), k], format, undefined, members);
    for (const bindingRows of [total(members), 3 * order.rowBlock]) {
      const room = { members, bindingRows, ...ROOMS[0] };
      const columns = workgroupColumns(psumbookKernel(format, order, 1, {}, room, true)!);
      for (const rows of [...members, bindingRows]) assertEquals(rows % columns, 0);
    }
  }
});

Deno.test("every format has a kernel for one row within what WebGPU guarantees", () => {
  for (let m = 1; m <= 16; m++) {
    for (let v = 1; v <= 64; v++) {
      const format = { m, v, g: 4 * v, b: 8 };
      const shape: MatrixShape = [300, 48 * v];
      const room = { members: [300], bindingRows: 300, ...ROOMS[2] };
      const kernel = psumbookKernel(format, codeOrder(shape, format), 1, {}, room, true);
      assert(kernel !== null && psumbookBytes(kernel) <= room.workgroupBytes, `m${m}v${v}`);
    }
  }
});

/** Rows of a random matrix, decoded by a variant. */
async function decode(
  gpu: Gpu,
  matrix: Matrix,
  variant: Partial<Variant>,
  { rows = 3, gap = 0 } = {},
): Promise<Uint32Array> {
  const x = bitsOf(randomActivations(rows * matrix.k, 4));
  const xStride = matrix.k + gap;
  const spaced = new Uint16Array(rows * xStride);
  for (let row = 0; row < rows; row++) {
    spaced.set(x.subarray(row * matrix.k, (row + 1) * matrix.k), row * xStride);
  }
  const y = await runLinear(gpu, {
    matrix,
    x: spaced,
    xStride,
    shape: stepShape(rows),
    ranges: ["decode"],
    profile: "codegemm",
    variant: { ...GPU_VARIANT, ...variant },
  });
  return new Uint32Array(y.buffer);
}

/** Asserts that the first outputs are the reference's, but for a rounding of float16 here and there. */
function assertFollows(actual: Uint32Array, expected: Float32Array, what: string) {
  // Outputs are about 1; adapters may round a float16 multiply-add twice, and order a few sums anew.
  const values = new Float32Array(actual.buffer, actual.byteOffset, expected.length);
  const worst = values.reduce((most, value, i) => Math.max(most, Math.abs(value - expected[i])), 0);
  assert(worst < 4e-3, `${what}: ${worst} from the reference`);
}

/** Runs `test` with a random matrix, and what the reference makes of the first row of activations. */
async function withMatrix(
  gpu: Gpu,
  shape: MatrixShape,
  name: string,
  test: (matrix: Matrix, expected: Float32Array) => Promise<void>,
) {
  const format = formatOf(name);
  const tensors = randomTensors("w", shape, format, 9);
  const matrix = await loadMatrix(gpu, tensors, "w", shape, format);
  const codes = await readCodeTensors(tensors, "w", shape, format);
  const x = randomActivations(3 * shape[1], 4).subarray(0, shape[1]);
  await test(matrix, codegemmProduct(codes, codeOrder(shape, format), x));
  matrix.destroy();
}

Deno.test("kernels of every kind of format follow the reference, and a row has the same bits in every batch", () =>
  withGpu(async (gpu) => {
    // Splits and whole sums; vectors that are no fours, and longer than what float16 may sum.
    const cases: [name: string, shape: MatrixShape, batches: (1 | 2 | 4)[]][] = [
      ["m2v8g64", [76, 448], [1, 2, 4]],
      ["m1v4g32", [70, 64], [1, 4]],
      ["m1v3g9", [70, 180], [2]],
      ["m3v6g12", [41, 216], [1, 4]],
      ["m2v18g36", [13, 216], [1]],
    ];
    for (const [name, shape, batches] of cases) {
      await withMatrix(gpu, shape, name, async (matrix, expected) => {
        const first = await decode(gpu, matrix, { batches: [batches[0]] });
        assertFollows(first, expected, name);
        for (const batch of batches.slice(1)) {
          assertEquals(await decode(gpu, matrix, { batches: [batch] }), first, `${name} x${batch}`);
        }
        if (name !== "m2v8g64") return;
        // Rows that cannot be bound as vectors.
        assertEquals(await decode(gpu, matrix, { batches: [1] }, { gap: 3 }), first);
      });
    }
  }));

Deno.test("threads, rows of N, teams and prefetching change no bit, in row blocks of any size", () =>
  withGpu(async (gpu) => {
    // Workgroups of several row blocks, then such as straddle two; the last ones stand over the end.
    const cases: [name: string, shape: MatrixShape, choices: DecodeChoice[]][] = [
      ["m2v8g128", [8180, 3072], [
        { codeThreads: 512 },
        { codeThreads: 256, prefetch: false },
        { codeThreads: 32 },
      ]],
      ["m4v4g64", [1500, 2048], [{ codeRowsPerThread: 8 }]],
    ];
    for (const [name, shape, choices] of cases) {
      await withMatrix(gpu, shape, name, async (matrix, expected) => {
        const standard = await decode(gpu, matrix, { batches: [1] }, { rows: 1 });
        assertFollows(standard, expected, name);
        for (const choice of choices) {
          const y = await decode(gpu, matrix, { batches: [1], decode: choice }, { rows: 1 });
          assert(y.every((word, i) => word === standard[i]), `${name} ${JSON.stringify(choice)}`);
        }
      });
    }
  }, "adapter"));

Deno.test("activations of a long split are taken in pieces", () =>
  withGpu(async (gpu) => {
    const shape: MatrixShape = [5, 64 * 1100];
    const format = formatOf("m1v4g64");
    const order = codeOrder(shape, format);
    const room = { members: [5], bindingRows: 5, ...ROOMS[0] };
    assert(psumbookKernel(format, order, 1, {}, room, true)!.inputTurns < order.splitUnits);
    const matrix = await loadMatrix(gpu, randomTensors("w", shape, format, 9), "w", shape, format);
    const loops = await decode(gpu, matrix, { unroll: false, batches: [1] }, { rows: 1 });
    const straight = await decode(gpu, matrix, { batches: [1] }, { rows: 1 });
    assertFollows(straight, new Float32Array(loops.buffer), "straight code");
    matrix.destroy();
  }, "adapter"));

Deno.test("a stack cut into bindings has the bits of a whole one, each matrix its own codebooks", () =>
  withGpu(async (gpu) => {
    const format = formatOf("m1v4g64");
    const k = 512, n = 1792;
    const sources = ["a", "b"].map((name, i) => randomTensors(name, [n, k], format, i));
    const of = (name: string) => sources.find((source) => source.has(name))!;
    const tensors = {
      ...sources[0],
      has: (name: string) => sources.some((source) => source.has(name)),
      info: (name: string) => of(name).info(name),
      read: (name: string, offset: number, length: number) => of(name).read(name, offset, length),
    };
    const members = ["a", "b"].map((name) => ({ name, n }));
    const run = async (maxBindingBytes?: number) => {
      const matrix = await loadStack(gpu, tensors, "ab", members, k, format, { maxBindingBytes });
      const y = await decode(gpu, matrix, { batches: [1] }, { rows: 1 });
      const blocks = matrix.blocks.length;
      matrix.destroy();
      return { y, blocks };
    };
    const whole = await run();
    const cut = await run(5 * 256 * (k / 16) * 4);
    assertEquals([whole.blocks, cut.blocks], [1, 3]);
    assertEquals(cut.y, whole.y);
    const second = await loadMatrix(gpu, sources[1], "b", [n, k], format);
    const alone = new Float32Array(
      (await decode(gpu, second, { batches: [1] }, { rows: 1 })).buffer,
    );
    assertFollows(whole.y.slice(n), alone, "the second matrix of the stack");
    second.destroy();
  }, "adapter"));
