import { assert, assertEquals } from "@std/assert";
import { parseFormatName } from "../../shared/checkpoint/mod.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import { loadMatrix } from "./matrix.ts";
import { linearScratchBytes, prefillCodes } from "./binding.ts";
import type { PrefillTile } from "./prefill_tile.ts";
import {
  chainQuads,
  paddedQuads,
  PREFILL_TILES,
  prefillBytes,
  prefillGroupK,
  prefillSplits,
  prefillThreads,
  tableCopies,
  threadPlace,
  tileK,
} from "./prefill_tile.ts";
import { randomTensors } from "./random_tensors.ts";
import { codePrefillProduct, readCodeTensors } from "./reference.ts";
import { bitsOf, randomActivations, runLinear, stepShape } from "./rig.ts";
import type { Matrix, MatrixShape } from "./types.ts";

/** Small ones, straight and in loops: items that run out, few and many threads, two buffers. */
const TILES: { tile: PrefillTile; unroll: boolean }[] = [
  { tile: { rows: 8, columns: 32, patchRows: 2, patchColumns: 2 }, unroll: false },
  { tile: { rows: 4, columns: 64, patchRows: 4, patchColumns: 1, depth: 64 }, unroll: false },
  { tile: { rows: 8, columns: 32, patchRows: 2, patchColumns: 2 }, unroll: true },
  { tile: { rows: 8, columns: 64, patchRows: 4, patchColumns: 1, copies: 1 }, unroll: true },
  { tile: { rows: 16, columns: 32, patchRows: 2, patchColumns: 1, buffers: 2 }, unroll: true },
  { tile: { rows: 4, columns: 32, patchRows: 2, patchColumns: 2, depth: 64 }, unroll: true },
  { tile: { rows: 4, columns: 32, patchRows: 1, patchColumns: 4, depth: 16 }, unroll: true },
];

async function load(gpu: Gpu, shape: MatrixShape, text: string) {
  const format = parseFormatName(text);
  const tensors = randomTensors("w", shape, format, shape[0] + shape[1]);
  const matrix = await loadMatrix(gpu, tensors, "w", shape, format, {});
  return { matrix, tensors };
}

function prefill(
  gpu: Gpu,
  matrix: Matrix,
  x: Float16Array<ArrayBuffer>,
  rows: number,
  { tile, unroll }: typeof TILES[number],
) {
  return runLinear(gpu, {
    matrix,
    x: bitsOf(x),
    shape: stepShape(0, rows),
    ranges: ["prefill"],
    variant: { prefillTiles: [tile], unroll },
  });
}

Deno.test("every tile gives a row the same bits, and those of the reference but for rounding", () =>
  withGpu(async (gpu) => {
    // Scales per tile, per group and shared; tails of K; long, wide and odd codes; two codebooks.
    for (
      const [text, shape] of [
        ["m1v4g128", [70, 256]],
        ["m2v8g8", [40, 96]],
        ["m1v4g48", [33, 336]],
        ["m2v12g36", [20, 144]],
        ["m1v20g40", [20, 160]],
        ["m1v8b16", [40, 112]],
        ["m1v4g32b9", [40, 96]],
        ["m2v3g9", [20, 72]],
        ["m1v4g128", [40, 2304]], // two splits of K, unequal
      ] as const
    ) {
      const { matrix, tensors } = await load(gpu, shape, text);
      const code = prefillCodes(matrix)!;
      const [n, k] = shape;
      const rows = 11;
      const x = randomActivations(rows * k, n);
      const codes = await readCodeTensors(tensors, "w", shape, code.format);
      const order = { groupK: prefillGroupK(code), ...prefillSplits(shape, code) };
      const truth = await prefill(gpu, matrix, x, rows, TILES[0]);
      for (const row of [0, 10]) {
        const expected = codePrefillProduct(codes, order, x.subarray(row * k, (row + 1) * k));
        for (let i = 0; i < n; i++) {
          const error = Math.abs(truth[row * n + i] - expected[i]);
          assert(error < 2e-3 * Math.sqrt(k), `${text} row ${row}, ${i}: ${error} off`);
        }
      }
      for (const how of TILES.slice(1)) {
        // Where a group has two sums, Mesa's compiler factors out their scale in straight code.
        if (how.unroll && chainQuads(tileK(how.tile, code)).length > 1) continue;
        const bits = new Uint32Array((await prefill(gpu, matrix, x, rows, how)).buffer);
        assertEquals(bits, new Uint32Array(truth.buffer), `${text} ${JSON.stringify(how)}`);
      }
      matrix.destroy();
    }
  }));

Deno.test("a small scratch takes prefill rows in chunks, with the same bits", () =>
  withGpu(async (gpu) => {
    const { matrix } = await load(gpu, [40, 2304], "m1v8g128");
    assertEquals(prefillSplits([40, 2304], prefillCodes(matrix)).splits, 2);
    // What one decode row needs holds 18 prefill rows.
    const scratchBytes = linearScratchBytes([40, 2304], matrix.format, 8) / 8;
    const run = (decode: number, scratchBytes?: number) =>
      runLinear(gpu, {
        matrix,
        x: bitsOf(randomActivations(23 * 2304, 2)),
        shape: stepShape(decode, 23 - decode),
        ranges: ["prefill"],
        scratchBytes,
      });
    for (const decode of [0, 4]) {
      const plenty = await run(decode);
      assert(plenty.subarray(decode * 40).every((value) => value !== 0));
      assertEquals(await run(decode, scratchBytes), plenty);
    }
    matrix.destroy();
  }));

Deno.test("a thread of a tile has a place of its own, and its reads meet in no bank", () => {
  for (const tile of [...PREFILL_TILES, ...TILES.map(({ tile }) => tile)]) {
    const code = threadPlace(tile).replaceAll(/(\d)u/g, "$1").replaceAll("let ", "var ");
    const place = new Function("lane", `${code}; return [tx, ty];`) as (lane: number) => number[];
    const places = Array.from({ length: prefillThreads(tile) }, (_, lane) => place(lane));
    assertEquals(new Set(places.map(String)).size, places.length);
    // Threads that read together meet in a bank only where they read the same.
    const stride = paddedQuads(tile.patchColumns * tileK(tile, null).quads) / 2;
    const half = new Set(places.slice(0, tile.rows > tile.patchRows ? 16 : 8).map(([x]) => x));
    assertEquals(new Set([...half].map((x) => x * stride % 8)).size, half.size);
    assert(
      places.every(([x, y]) =>
        x * tile.patchColumns < tile.columns && y * tile.patchRows < tile.rows
      ),
    );
  }
});

Deno.test("the tiles that a GPU starts with fit WebGPU's default limits in the paper's formats", () => {
  const order = { rowBlock: 1024, scalePositions: 32 };
  const format = { m: 1, v: 4, g: 128, b: 8 };
  const tile = { rows: 64, columns: 128, patchRows: 8, patchColumns: 4 };
  assertEquals(tileK(tile, { format, order }).depth, 32);
  assert(prefillBytes(tile, { format, order }) <= 16384);
  assertEquals(tableCopies(tile, { format, order }, 16384), 1);
  assertEquals(tableCopies(tile, { format, order }, 49152), 4);
});
