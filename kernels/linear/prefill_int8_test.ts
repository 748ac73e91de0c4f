import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import { linearScratchBytes } from "./binding.ts";
import { formatOf, outlineOf, ROOMS, SHAPES } from "./decode_fixture.ts";
import { loadMatrix, loadStack } from "./matrix.ts";
import { holdableTiles, layerCodes } from "./prefill.ts";
import type { PrefillTile } from "./prefill_tile.ts";
import {
  PREFILL_TILES,
  prefillBytes,
  prefillGroupK,
  prefillSplits,
  tableCopies,
  tileK,
  tilePieces,
} from "./prefill_tile.ts";
import { randomTensors } from "./random_tensors.ts";
import { int8PrefillProduct, readCodeTensors } from "./reference.ts";
import { bitsOf, randomActivations, runLinear, stepShape } from "./rig.ts";
import type { Matrix, MatrixShape } from "./types.ts";

const PROFILE = { version: 0, decode: "int8" } as const;

/** Small ones, straight and in loops: items that run out, few and many threads, two buffers. */
const TILES: { tile: PrefillTile; unroll: boolean }[] = [
  { tile: { rows: 8, columns: 32, patchRows: 2, patchColumns: 2 }, unroll: false },
  { tile: { rows: 8, columns: 32, patchRows: 4, patchColumns: 2 }, unroll: true },
  { tile: { rows: 16, columns: 32, patchRows: 2, patchColumns: 1, buffers: 2 }, unroll: true },
  {
    tile: { rows: 4, columns: 32, patchRows: 1, patchColumns: 4, depth: 16, copies: 1 },
    unroll: true,
  },
  { tile: { rows: 4, columns: 64, patchRows: 4, patchColumns: 1, depth: 128 }, unroll: false },
  {
    tile: { rows: 4, columns: 32, patchRows: 2, patchColumns: 2, depth: 128, buffers: 2 },
    unroll: true,
  },
];

function prefill(
  gpu: Gpu,
  matrix: Matrix,
  x: Float16Array<ArrayBuffer>,
  { tile, unroll, scratchBytes }: typeof TILES[number] & { scratchBytes?: number },
  decodeRows = 0,
) {
  return runLinear(gpu, {
    matrix,
    x: bitsOf(x),
    shape: stepShape(decodeRows, x.length / matrix.k - decodeRows),
    ranges: ["prefill"],
    profile: "int8",
    scratchBytes,
    variant: { prefillTiles: [tile], unroll },
  });
}

Deno.test("int8 prefill rows have the same bits in every tile, and those of the reference but for float32 rounding", () =>
  withGpu(async (gpu) => {
    const cases: [name: string, shape: MatrixShape, tiles?: typeof TILES][] = [
      // Tails of K in deep tiles; two splits of K, unequal; N that no tile divides.
      ["m1v4g64", [41, 192], TILES],
      ["m1v4g128", [40, 2304], TILES],
      // Codebooks that are added; groups of 16, 32 and 48 K; parts of a code word; long codes.
      ["m2v8g128", [70, 384]],
      ["m4v4g32", [20, 96]],
      ["m2v4g16", [33, 80]],
      ["m1v8g16", [20, 96]],
      ["m1v12g48", [20, 2304]],
      ["m1v24g48", [20, 192]],
      ["m1v32g32", [20, 384]],
    ];
    for (const [name, shape, tiles = TILES.slice(-2)] of cases) {
      const format = formatOf(name);
      const [n, k] = shape;
      const tensors = randomTensors("w", shape, format, n + k);
      const matrix = await loadMatrix(gpu, tensors, "w", shape, format);
      const code = layerCodes({ matrix, profile: PROFILE })!;
      assert(code.int8Positions !== undefined);
      const rows = 11;
      const x = randomActivations(rows * k, n);
      // Rows of unlike magnitude, and within one groups of zeros.
      x.forEach((value, i) => x[i] = value * 10 ** (Math.floor(i / k) % 3 - 1));
      x.fill(0, 10 * k, 10 * k + 64);
      const codes = await readCodeTensors(tensors, "w", shape, format);
      const order = { groupK: prefillGroupK(code), ...prefillSplits(shape, code) };
      const first = await prefill(gpu, matrix, x, TILES[0]);
      for (const row of [0, 10]) {
        const expected = int8PrefillProduct(codes, order, x.subarray(row * k, (row + 1) * k));
        const size = Math.max(...expected.map(Math.abs));
        expected.forEach((value, i) =>
          assertAlmostEquals(first[row * n + i], value, 1e-5 * size, `${name} row ${row}, ${i}`)
        );
      }
      for (const how of tiles) {
        const y = await prefill(gpu, matrix, x, how);
        assertEquals(bits(y), bits(first), `${name} ${JSON.stringify(how)}`);
      }
      matrix.destroy();
    }
  }));

const bits = (y: Float32Array<ArrayBuffer>) => new Uint32Array(y.buffer);

Deno.test("an int8 prefill row has the same bits alone, among others, behind decode rows and in chunks", () =>
  withGpu(async (gpu) => {
    const shape: MatrixShape = [40, 2304];
    const format = formatOf("m1v4g128");
    const matrix = await loadMatrix(gpu, randomTensors("w", shape, format, 3), "w", shape, format);
    const [n, k] = shape;
    const x = randomActivations(19 * k, 5);
    // Of two splits of K, what one decode row needs holds 18 prefill rows.
    const scratchBytes = linearScratchBytes(shape, format, 8) / 8;
    for (const how of [TILES[0], TILES[1]]) {
      const all = await prefill(gpu, matrix, x, how);
      assert(all.every((value) => value !== 0));
      const from = (row: number, rows: number) => x.slice(row * k, (row + rows) * k);
      assertEquals(await prefill(gpu, matrix, from(6, 1), how), all.slice(6 * n, 7 * n));
      const behind = await prefill(gpu, matrix, from(3, 12), how, 5);
      assertEquals(behind.subarray(5 * n), all.slice(8 * n, 15 * n));
      assert(behind.subarray(0, 5 * n).every((value) => value === 0));
      assertEquals(await prefill(gpu, matrix, x, { ...how, scratchBytes }), all);
    }
    matrix.destroy();
  }));

Deno.test("rows of zeros are zeros, and rows that the step does not name may hold NaN", () =>
  withGpu(async (gpu) => {
    const shape: MatrixShape = [20, 128];
    const format = formatOf("m1v4g128");
    const matrix = await loadMatrix(gpu, randomTensors("w", shape, format, 3), "w", shape, format);
    const x = new Float16Array(9 * 128);
    x.fill(NaN, 5 * 128);
    for (const how of [TILES[0], TILES[1]]) {
      const y = await runLinear(gpu, {
        matrix,
        x: bitsOf(x),
        y: new Float32Array(9 * 20).fill(7),
        shape: stepShape(0, 5),
        ranges: ["prefill"],
        maxRows: 9,
        profile: "int8",
        variant: { prefillTiles: [how.tile], unroll: how.unroll },
      });
      assertEquals(y, Float32Array.from(y, (_, i) => i < 5 * 20 ? 0 : 7));
    }
    matrix.destroy();
  }));

Deno.test("in a stack, int8 prefill rows have the bits that they have of each matrix", () =>
  withGpu(async (gpu) => {
    const format = formatOf("m1v8g64");
    const k = 128, n = 256;
    const sources = ["a", "b"].map((name, i) => randomTensors(name, [n, k], format, i));
    const of = (name: string) => sources.find((source) => source.has(name))!;
    const tensors: typeof sources[number] = {
      ...sources[0],
      has: (name) => sources.some((source) => source.has(name)),
      info: (name) => of(name).info(name),
      read: (name, offset, length) => of(name).read(name, offset, length),
    };
    const x = randomActivations(3 * k, 4);
    const members = ["a", "b"].map((name) => ({ name, n }));
    const stack = await loadStack(gpu, tensors, "ab", members, k, format);
    const stacked = await prefill(gpu, stack, x, TILES[1]);
    stack.destroy();
    for (const [i, { name }] of members.entries()) {
      const matrix = await loadMatrix(gpu, tensors, name, [n, k], format);
      const alone = await prefill(gpu, matrix, x, TILES[1]);
      for (let row = 0; row < 3; row++) {
        const from = (row * 2 + i) * n;
        assertEquals(stacked.slice(from, from + n), alone.slice(row * n, (row + 1) * n));
      }
      matrix.destroy();
    }
  }));

Deno.test("a tile of integers takes whole groups, splits whole tiles, and every matrix has one that fits", () => {
  for (const name of ["m1v4g128", "m2v8g128", "m8v4g128", "m1v12g96", "m1v24g96", "m1v32g128"]) {
    for (const [members, k] of SHAPES) {
      if (k % formatOf(name).g !== 0) continue;
      const matrix = outlineOf(members, k, formatOf(name));
      const code = layerCodes({ matrix, profile: PROFILE })!;
      if (code.int8Positions === undefined) continue;
      const float16 = prefillSplits(
        [matrix.n, k],
        layerCodes({ matrix, profile: { ...PROFILE, decode: "dequantize" } }),
      );
      const { splits, splitK } = prefillSplits([matrix.n, k], code);
      // The scratch is made for those of float16.
      assert(splits === 1 || splits === float16.splits);
      for (const { maxThreads, workgroupBytes } of ROOMS) {
        const limits = {
          maxComputeInvocationsPerWorkgroup: maxThreads,
          maxComputeWorkgroupStorageSize: workgroupBytes,
        } as GPUSupportedLimits;
        for (const tiles of [PREFILL_TILES, []]) {
          for (const tile of holdableTiles({ limits }, matrix, tiles, code)) {
            const { depth, groupK } = tileK(tile, code);
            assertEquals([depth % groupK, groupK % 16, splits > 1 ? splitK % depth : 0], [0, 0, 0]);
            const { threadRows, threadColumns } = tilePieces(tile, code);
            assertEquals([threadRows % 2, threadColumns % 2], [1, 1]);
            const { m, v } = code.format;
            const table = tableCopies(tile, code, workgroupBytes) * m * 256 * v;
            assert(prefillBytes(tile, code) + table <= workgroupBytes, `${name} ${matrix.name}`);
          }
        }
      }
    }
  }
});
