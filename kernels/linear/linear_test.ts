import { assert, assertEquals } from "@std/assert";
import { parseFormatName } from "../../shared/checkpoint/mod.ts";
import type { CodeGemmFormat, TensorSource } from "../../shared/model_config.ts";
import { randomInt, seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import type { LinearStore } from "../kernel.ts";
import { STEP_BYTES } from "../kernel.ts";
import { linearScratchBytes } from "./binding.ts";
import { createLinear } from "./linear.ts";
import { loadMatrix } from "./matrix.ts";
import { codeOrder, DENSE_TILE_K, denseOrder } from "./order.ts";
import { prefillGroupK, prefillSplits } from "./prefill_tile.ts";
import { randomTensors } from "./random_tensors.ts";
import {
  codegemmProduct,
  codePrefillProduct,
  densePrefillProduct,
  denseProduct,
  dequantize,
  dequantizeProduct,
  exactProduct,
  readCodeTensors,
} from "./reference.ts";
import { bitsOf, randomActivations, runLinear, stepShape } from "./rig.ts";
import type { Matrix, MatrixShape } from "./types.ts";
import type { Variant } from "./variant.ts";
import { defaultVariant } from "./variant.ts";
import { BATCHES } from "./wgsl.ts";

interface Case {
  matrix: Matrix;
  shape: MatrixShape;
  weights: ArrayLike<number>;
  tensors: TensorSource;
  format: CodeGemmFormat | null;
}

async function makeCase(
  gpu: Gpu,
  shape: MatrixShape,
  text: string,
  maxBindingBytes?: number,
): Promise<Case> {
  const codes = text === "dense" ? null : parseFormatName(text);
  const tensors = randomTensors("w", shape, codes, shape[0] + shape[1]);
  const matrix = await loadMatrix(gpu, tensors, "w", shape, codes, { maxBindingBytes });
  const weights = codes === null
    ? new Float16Array((await tensors.read("w.weight", 0, shape[0] * shape[1] * 2)).buffer)
    : dequantize(await readCodeTensors(tensors, "w", shape, codes));
  return { matrix, shape, weights, tensors, format: codes };
}

/** The reference of a kernel with its own order, for one row. */
async function orderedReference(
  of: Case,
  kind: "codegemm" | "dequantize" | "prefill",
  x: Float16Array,
): Promise<Float32Array> {
  const { matrix: { order }, shape, weights, tensors } = of;
  if (order.kind === "dense") {
    return kind === "prefill"
      ? densePrefillProduct(weights, shape, x)
      : denseProduct(weights, shape, order, DENSE_TILE_K, x);
  }
  const codes = await readCodeTensors(tensors, "w", shape, of.format!);
  switch (kind) {
    case "prefill": {
      const code = { format: codes.format, order };
      const sums = { groupK: prefillGroupK(code), ...prefillSplits(shape, code) };
      return codePrefillProduct(codes, sums, x);
    }
    case "codegemm":
      return codegemmProduct(codes, order, x);
    case "dequantize":
      return dequantizeProduct(codes, order, x);
  }
}

/** The largest error of a row, as a fraction of the sum of its products' magnitudes. */
function worst(actual: Float32Array, expected: ArrayLike<number>, magnitude: Float64Array): number {
  let most = 0;
  for (let n = 0; n < actual.length; n++) {
    const error = Math.abs(actual[n] - expected[n]) / magnitude[n];
    if (!(error <= most)) most = error;
  }
  return most;
}

async function comparesWithReferences(
  gpu: Gpu,
  shape: MatrixShape,
  text: string,
  variant?: Partial<Variant>,
  kinds: ("codegemm" | "dequantize" | "prefill")[] = ["codegemm", "dequantize", "prefill"],
): Promise<void> {
  const of = await makeCase(gpu, shape, text);
  const [n, k] = shape;
  const rows = 3;
  const x = randomActivations(rows * k, n);
  for (const kind of kinds) {
    if (text === "dense" && kind === "dequantize") continue;
    const y = await runLinear(gpu, {
      matrix: of.matrix,
      x: bitsOf(x),
      shape: kind === "prefill" ? stepShape(0, rows) : stepShape(rows),
      ranges: [kind === "prefill" ? "prefill" : "decode"],
      profile: kind === "prefill" ? "codegemm" : kind,
      variant,
    });
    const row = randomInt(seededRandom(n * k), rows);
    const input = x.subarray(row * k, (row + 1) * k);
    const output = y.subarray(row * n, (row + 1) * n);
    const exact = exactProduct(of.weights, shape, input);
    const ordered = await orderedReference(of, kind, input);
    const at = `${n} x ${k} ${text} ${kind}`;
    const exactError = worst(output, exact.y, exact.magnitude);
    assert(
      exactError <= (text === "dense" ? 1e-6 : 1e-3),
      `${at}: ${exactError} from exact`,
    );
    // An adapter may round once or twice in a float16 multiply-add; everything else is fixed.
    const orderedError = worst(output, ordered, exact.magnitude);
    const bound = text === "dense" ? 1e-7 : 1e-3;
    assert(orderedError <= bound, `${at}: ${orderedError} from its own order`);
  }
  of.matrix.destroy();
}

/** Runs `test` on an adapter with WebGPU's default limits, and closes it. */
Deno.test("dense linear layers equal their references on awkward shapes", () =>
  withGpu(async (gpu) => {
    const shapes: MatrixShape[] = [[8, 8], [129, 172], [70, 255], [1, 1], [300, 1100], [384, 33]];
    for (const shape of shapes) await comparesWithReferences(gpu, shape, "dense");
  }));

Deno.test("CodeGEMM linear layers equal their references in many formats, at default limits", () =>
  withGpu(async (gpu) => {
    await comparesWithReferences(gpu, [384, 384], "m1v4g128");
    await comparesWithReferences(gpu, [300, 512], "m2v8g128");
    await comparesWithReferences(gpu, [9, 1280], "m2v4g128");
    await comparesWithReferences(gpu, [130, 192], "m1v8g64");
    await comparesWithReferences(gpu, [64, 96], "m3v4g32");
    await comparesWithReferences(gpu, [70, 72], "m2v3g9", undefined, ["codegemm", "prefill"]);
    await comparesWithReferences(gpu, [40, 128], "m1v32g32", undefined, ["dequantize"]);
    await comparesWithReferences(gpu, [40, 72], "m2v18g36", undefined, ["prefill"]);
  }));

Deno.test("codes of 9 to 16 bits equal their references, whichever family the plan asks for", () =>
  withGpu(async (gpu) => {
    const kinds = ["dequantize", "prefill"] as const;
    // AQLM's 1x16, one scale per row; then scale groups, long vectors, two codebooks, odd lengths.
    await comparesWithReferences(gpu, [71, 208], "m1v8b16", undefined, [...kinds]);
    await comparesWithReferences(gpu, [33, 96], "m1v16g48b16", undefined, [...kinds]);
    await comparesWithReferences(gpu, [40, 140], "m2v10g70b9", undefined, [...kinds]);
    await comparesWithReferences(gpu, [20, 96], "m3v4b12", undefined, [...kinds]);
    const of = await makeCase(gpu, [71, 208], "m1v8b16");
    const run = (profile: "codegemm" | "dequantize") =>
      runLinear(gpu, {
        matrix: of.matrix,
        x: bitsOf(randomActivations(3 * 208, 5)),
        shape: stepShape(3),
        ranges: ["decode"],
        profile,
      });
    assertEquals(await run("codegemm"), await run("dequantize"));
  }));

Deno.test("CodeGEMM linear layers equal their references at the adapter's limits", () =>
  withGpu(async (gpu) => {
    await comparesWithReferences(gpu, [1300, 256], "m2v8g128", undefined, ["codegemm"]);
    await comparesWithReferences(gpu, [2100, 64], "m1v4g8", undefined, ["codegemm", "dequantize"]);
  }, "adapter"));

Deno.test("unrolled CodeGEMM kernels, as GPUs run them, equal their references", () =>
  withGpu(async (gpu) => {
    const variant = { unroll: true, decode: { turnK: 16 } };
    const kinds = ["codegemm", "dequantize"] as const;
    await comparesWithReferences(gpu, [260, 384], "m1v4g128", variant, [...kinds]);
    await comparesWithReferences(gpu, [70, 72], "m2v6g12", variant, [...kinds]);
    const wide = ["dequantize", "prefill"] as const;
    await comparesWithReferences(gpu, [71, 208], "m1v8b16", variant, [...wide]);
    await comparesWithReferences(gpu, [40, 192], "m2v16g32b11", variant, [...wide]);
    await comparesWithReferences(gpu, [40, 96], "m1v4g32b13", variant, [...wide]);
    await comparesWithReferences(gpu, [40, 96], "m1v4b9", variant, [...wide]);
  }));

Deno.test("a matrix of many splits is reduced in slices", () =>
  withGpu(async (gpu) => {
    const of = await makeCase(gpu, [40, 2048], "m1v8g64");
    assert(of.matrix.order.slices > 1);
    of.matrix.destroy();
    await comparesWithReferences(gpu, [40, 2048], "m1v8g64", undefined, ["codegemm"]);
  }));

Deno.test("a row's bits do not depend on its company, its place, the batch or the turn", () =>
  withGpu(async (gpu) => {
    for (
      const [text, shape] of [["dense", [130, 520]], ["m2v4g32", [140, 192]], [
        "m1v8b16",
        [140, 208],
      ]] as const
    ) {
      const of = await makeCase(gpu, shape, text);
      const [n, k] = shape;
      const rows = 37;
      const x = bitsOf(randomActivations(rows * k, 3));
      for (const profile of ["codegemm", "dequantize"] as const) {
        if (text === "dense" && profile === "dequantize") continue;
        const run = (decode: number, prefill: number, from: number, variant?: Partial<Variant>) =>
          runLinear(gpu, {
            matrix: of.matrix,
            x: x.slice(from * k),
            shape: stepShape(decode, prefill),
            ranges: ["decode", "prefill"],
            profile,
            variant,
          });
        const decoded = await run(rows, 0, 0);
        const prefilled = await run(0, rows, 0);
        const same = (y: Float32Array, truth: Float32Array, row: number, at: number, how: string) =>
          assertEquals(
            new Uint32Array(y.slice(at * n, (at + 1) * n).buffer),
            new Uint32Array(truth.slice(row * n, (row + 1) * n).buffer),
            `${text} ${profile}: row ${row} ${how}`,
          );
        for (const row of [0, 5, 36]) {
          same(await run(1, 0, row), decoded, row, 0, "alone");
          same(await run(0, 1, row), prefilled, row, 0, "prefilled alone");
        }
        for (const decode of [2, 3, 6, 9]) {
          const y = await run(decode, 7, 11);
          for (let i = 0; i < decode; i++) same(y, decoded, 11 + i, i, `among ${decode}`);
          for (let i = 0; i < 7; i++) {
            same(y, prefilled, 11 + decode + i, decode + i, `prefilled beside ${decode}`);
          }
        }
        const tile = { rows: 16, columns: 32, patchRows: 4, patchColumns: 2 };
        assertEquals(await run(0, rows, 0, { prefillTiles: [tile] }), prefilled);
        const variants: Partial<Variant>[] = [
          { batches: [1], decode: { turnK: 16 } },
          { batches: [2] },
          { batches: [4], byBatch: { 4: { turnK: 32 } } },
          {
            prefillTiles: [{
              rows: 16,
              columns: 32,
              patchRows: 2,
              patchColumns: 2,
            }],
          },
        ];
        if (text !== "dense") {
          variants.push(
            { batches: [2], unroll: true, decode: { turnK: 16 } },
            { batches: [4], unroll: true, decode: { turnK: 16, prefetch: true } },
          );
        }
        for (const variant of variants) {
          const y = await run(4, 5, 20, variant);
          const how = JSON.stringify(variant);
          for (let i = 0; i < 4; i++) same(y, decoded, 20 + i, i, how);
          for (let i = 4; i < 9; i++) same(y, prefilled, 20 + i, i, how);
        }
      }
      of.matrix.destroy();
    }
  }));

Deno.test("straight kernels, as GPUs run them, give a row the same bits in every batch", () =>
  withGpu(async (gpu) => {
    for (const text of ["m1v4g128", "m2v8g128", "m1v8b16"]) {
      const of = await makeCase(gpu, [260, 256], text);
      const [n, k] = of.shape;
      const rows = 17;
      const x = bitsOf(randomActivations(rows * k, 6));
      const wide = of.format!.b > 8;
      for (const profile of wide ? ["dequantize"] as const : ["codegemm", "dequantize"] as const) {
        const run = (batches: Variant["batches"]) =>
          runLinear(gpu, {
            matrix: of.matrix,
            x,
            shape: stepShape(rows),
            ranges: ["decode"],
            profile,
            variant: { ...defaultVariant(false), decode: { turnK: 32 }, batches },
          });
        const alone = new Uint32Array((await run([1])).buffer);
        assertEquals(alone.length, rows * n);
        const most = profile === "codegemm" ? 4 : wide ? 8 : 16;
        for (const batch of BATCHES.filter((batch) => batch > 1 && batch <= most)) {
          const bits = new Uint32Array((await run([batch])).buffer);
          assertEquals(bits, alone, `${text} ${profile} x${batch}`);
        }
      }
      of.matrix.destroy();
    }
  }));

Deno.test("every store mode works through views with offsets and strides, and touches nothing else", () =>
  withGpu(async (gpu) => {
    for (const [text, shape] of [["dense", [50, 100]], ["m1v4g32", [50, 128]]] as const) {
      const of = await makeCase(gpu, shape, text);
      const [n, k] = shape;
      const [decode, rows] = [2, 5];
      const [xStride, xOffset, yStride, yOffset] = [k + 7, 5, n + 9, 3];
      const x = randomActivations(xOffset + rows * xStride, 8);
      const before = Float32Array.from(
        { length: yOffset + rows * yStride },
        (_, i) => Math.sin(i) * 3,
      );
      const run = (store: LinearStore) =>
        runLinear(gpu, {
          matrix: of.matrix,
          x: bitsOf(x),
          xStride,
          xOffset,
          y: before,
          yStride,
          yOffset,
          store,
          shape: stepShape(decode, rows - decode),
          ranges: ["decode", "prefill"],
        });
      const stored = await run("store");
      const added = await run("add");
      const rounded = await run("add-round");
      for (let row = 0; row < rows; row++) {
        const at = xOffset + row * xStride;
        const exact = exactProduct(of.weights, shape, x.subarray(at, at + k));
        const product = stored.subarray(yOffset + row * yStride, yOffset + row * yStride + n);
        assert(worst(product, exact.y, exact.magnitude) < 4e-4, `${text} row ${row}`);
      }
      for (let i = 0; i < before.length; i++) {
        const column = (i - yOffset) % yStride;
        if (i < yOffset || column >= n) {
          assertEquals([stored[i], added[i], rounded[i]], Array(3).fill(before[i]));
        } else {
          assertEquals(added[i], Math.fround(before[i] + stored[i]));
          assertEquals(rounded[i], Math.f16round(added[i]));
        }
      }
      of.matrix.destroy();
    }
  }));

Deno.test("rows that the step does not name may hold NaN", () =>
  withGpu(async (gpu) => {
    for (const [text, shape] of [["dense", [20, 40]], ["m1v4g32", [20, 64]]] as const) {
      const of = await makeCase(gpu, shape, text);
      const [n, k] = shape;
      const x = randomActivations(12 * k, 4);
      const clean = bitsOf(x);
      const stale = clean.slice().fill(0x7e00, 5 * k);
      for (const profile of ["codegemm", "dequantize"] as const) {
        const run = (x: Uint16Array<ArrayBuffer>) =>
          runLinear(gpu, {
            matrix: of.matrix,
            x,
            shape: stepShape(3, 2, 3),
            ranges: ["decode", "prefill"],
            maxRows: 12,
            profile,
          });
        assertEquals(await run(stale), await run(clean));
      }
      assert(n > 0);
      of.matrix.destroy();
    }
  }));

Deno.test("a matrix larger than a binding is split into row blocks, with the same bits", () =>
  withGpu(async (gpu) => {
    for (
      const [text, shape, bytes] of [
        ["dense", [600, 64], 128 * 64 * 2 * 2],
        ["m1v4g32", [4200, 64], 64 * 1024],
      ] as const
    ) {
      const whole = await makeCase(gpu, shape, text);
      const split = await makeCase(gpu, shape, text, bytes);
      assert(split.matrix.blocks.length > 1 && whole.matrix.blocks.length === 1);
      assert(split.matrix.blocks.every((block) => block.weights.size <= bytes));
      const run = (matrix: Matrix) =>
        runLinear(gpu, {
          matrix,
          x: bitsOf(randomActivations(6 * shape[1], 2)),
          shape: stepShape(3, 3),
          ranges: ["decode", "prefill"],
        });
      assertEquals(await run(split.matrix), await run(whole.matrix));
    }
  }));

Deno.test("a small scratch takes more dispatches and gives the same bits", () =>
  withGpu(async (gpu) => {
    const of = await makeCase(gpu, [40, 256], "m1v4g32");
    const row = linearScratchBytes(of.shape, of.format, 16) / 16;
    const run = (scratchBytes?: number) =>
      runLinear(gpu, {
        matrix: of.matrix,
        x: bitsOf(randomActivations(21 * 256, 2)),
        shape: stepShape(20),
        ranges: ["decode"],
        maxRows: 21,
        scratchBytes,
      });
    const plenty = await run();
    for (const rows of [1, 3, 8, 17]) assertEquals(await run(rows * row), plenty);
  }));

Deno.test("steps of any number of rows, in any chunks, have the bits of rows alone", () =>
  withGpu(async (gpu) => {
    // More rows than the scratch holds, and numbers of them that take other kernels than the largest.
    for (const text of ["dense", "m1v4g64"]) {
      const of = await makeCase(gpu, [72, 1024], text);
      const [n, k] = of.shape;
      const most = 41;
      const x = bitsOf(randomActivations(most * k, 8));
      const { splits, rowBlock } = of.format === null
        ? denseOrder(of.shape)
        : codeOrder(of.shape, of.format).dequantize;
      assert(splits > 1);
      const run = (rows: number, batches: Variant["batches"], scratchRows: number) =>
        runLinear(gpu, {
          matrix: of.matrix,
          x,
          shape: stepShape(rows),
          ranges: ["decode"],
          profile: "dequantize",
          scratchBytes: scratchRows * splits * rowBlock * 4,
          variant: { ...defaultVariant(false), batches, decode: { turnK: 16 } },
        });
      const alone = await run(most, [1], most);
      const follows = async (
        rows: number,
        scratchRows: number,
        batches: Variant["batches"] = BATCHES,
      ) => {
        const y = await run(rows, batches, scratchRows);
        assertEquals(y, alone.slice(0, rows * n), `${text}: ${rows} rows, room for ${scratchRows}`);
      };
      for (const [rows, room] of [[9, 16], [17, 32], [41, 16], [41, 33]]) await follows(rows, room);
      // Sixteen rows at once would not fit, however few kernels are left.
      await follows(41, 15, [1, 16]);
      of.matrix.destroy();
    }
  }));

Deno.test("output rows run the decode kernels", () =>
  withGpu(async (gpu) => {
    const of = await makeCase(gpu, [300, 64], "dense");
    const x = bitsOf(randomActivations(5 * 64, 2));
    const common = { matrix: of.matrix, x };
    const decoded = await runLinear(gpu, { ...common, shape: stepShape(5), ranges: ["decode"] });
    const outputs = await runLinear(gpu, {
      ...common,
      shape: stepShape(2, 30, 5),
      ranges: ["outputs"],
    });
    assertEquals(outputs.slice(0, 5 * 300), decoded);
  }));

Deno.test("every kernel that a GPU would run compiles at default limits", () =>
  withGpu(async (gpu) => {
    const variant = defaultVariant(false);
    const profiles = ["codegemm", "dequantize"] as const;
    for (const text of ["dense", "m1v4g128", "m2v8g128", "m8v8g128", "m1v8b16"]) {
      const shape: MatrixShape = [1025, 1024];
      const of = await makeCase(gpu, shape, text);
      const buffers = [2048, 4100, linearScratchBytes(shape, of.format, 1)]
        .map((bytes) => gpu.storage("buffer", bytes));
      const step = gpu.buffer("step", STEP_BYTES, GPUBufferUsage.UNIFORM);
      for (const decode of profiles) {
        const linear = await createLinear({
          gpu,
          label: text,
          matrix: of.matrix,
          step,
          input: { buffer: buffers[0], stride: 1024, offset: 0 },
          output: { buffer: buffers[1], stride: 1025, offset: 0 },
          store: "add-round",
          maxRows: 8,
          scratch: buffers[2],
          ranges: ["decode", "prefill", "outputs"],
          profile: { version: 1, decode },
          variant,
        });
        linear.destroy();
      }
      of.matrix.destroy();
    }
  }));
