/**
 * Threads and workgroup memory that every generated kernel declares, read from its WGSL: beyond the
 * adapter's limit not everyone refuses a kernel, and a GPU hangs on it.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { checkFormat, parseFormatName } from "../shared/checkpoint/mod.ts";
import type { CodeGemmFormat } from "../shared/model_config.ts";
import { CANDIDATES } from "./linear/autotune.ts";
import { decodeCode } from "./linear/decode.ts";
import { outlineOf, total } from "./linear/decode_fixture.ts";
import { canStack } from "./linear/order.ts";
import { holdableTiles, layerCodes, prefillCode } from "./linear/prefill.ts";
import { PREFILL_TILES, tileName } from "./linear/prefill_tile.ts";
import type { Matrix } from "./linear/types.ts";
import { decodeFamily, defaultVariant, familyBatches } from "./linear/variant.ts";
import { BATCHES } from "./linear/wgsl.ts";
import type { Gpu } from "./gpu.ts";
import { prefillWgsl } from "./transformer/attention_wgsl.ts";
import { decodeSplitWgsl } from "./transformer/decode_attention_wgsl.ts";
import { decodeJoinWgsl } from "./transformer/decode_join_wgsl.ts";
import { headShape } from "./transformer/kv_layout.ts";
import { rmsnormWgsl } from "./transformer/rmsnorm_wgsl.ts";

/** What adapters offer, from WebGPU's guaranteed limits to an NVIDIA GPU's. */
const LIMITS = [[16, 256], [32, 1024], [48, 1024]].map(([kibibytes, threads]) => ({
  maxComputeWorkgroupStorageSize: kibibytes * 1024,
  maxComputeInvocationsPerWorkgroup: threads,
}));
const GUARANTEED = LIMITS[0];

/** Stacks of N, and K: Llama-3 70B's and 8B's, the demo model's, and an uneven one. */
const SHAPES: [members: number[], k: number][] = [
  [[8192, 1024, 1024], 8192],
  [[8192], 8192],
  [[28672, 28672], 8192],
  [[8192], 28672],
  [[4096, 1024, 1024], 4096],
  [[4096], 4096],
  [[14336, 14336], 4096],
  [[4096], 14336],
  [[384], 384],
  [[128], 384],
  [[1024, 1024], 384],
  [[384], 1024],
  [[70], 960],
];

const FORMATS = ["m1v4g128", "m2v8g128", "m2v4g128", "m8v8g128", "m1v8b16", "m1v6g96", "m3v20g40"]
  .map((name) => parseFormatName(name)!);

const SCALARS: Record<string, number> = { f16: 2, f32: 4, u32: 4, i32: 4 };

/** Bytes of a WGSL type that workgroup memory may hold. */
function typeBytes(type: string, constants: Map<string, number>): number {
  const array = /^array<(.*), *(\w+)>$/.exec(type);
  if (array) {
    const count = constants.get(array[2]) ?? parseInt(array[2]);
    return typeBytes(array[1], constants) * count;
  }
  const vector = /^vec([24])<(\w+)>$/.exec(type);
  const bytes = vector ? Number(vector[1]) * SCALARS[vector[2]] : SCALARS[type];
  assert(bytes > 0, `${type} is of known size`);
  return bytes;
}

/** Bytes of workgroup memory, and threads, that a kernel declares. */
function declared(code: string): { bytes: number; threads: number } {
  const constants = new Map(
    [...code.matchAll(/const (\w+) = (\d+)u;/g)].map(([, name, value]) => [name, Number(value)]),
  );
  const variables = [...code.matchAll(/var<workgroup> \w+: ([^;]+);/g)];
  assertEquals(variables.length, code.split("var<workgroup>").length - 1);
  const threads = /@workgroup_size\((\w+)\)/.exec(code)![1];
  return {
    bytes: variables.reduce((sum, [, type]) => sum + typeBytes(type, constants), 0),
    threads: constants.get(threads) ?? parseInt(threads),
  };
}

function assertFits(code: string, limits: typeof GUARANTEED, what: string) {
  const { bytes, threads } = declared(code);
  assert(
    bytes <= limits.maxComputeWorkgroupStorageSize,
    `${what} takes ${bytes} of ${limits.maxComputeWorkgroupStorageSize} bytes`,
  );
  assert(threads <= limits.maxComputeInvocationsPerWorkgroup, `${what} has ${threads} threads`);
}

/** The outline of a matrix, or null where it cannot be in the format. */
function matrixOf(members: number[], k: number, format: CodeGemmFormat | null): Matrix | null {
  if (format !== null) {
    if (members.length > 1 && !canStack(members)) return null;
    try {
      checkFormat(format, "w", [total(members), k]);
    } catch {
      return null;
    }
  }
  return outlineOf(members, k, format);
}

function* matrices(): Generator<Matrix> {
  for (const [members, k] of SHAPES) {
    for (const format of FORMATS) {
      const matrix = matrixOf(members, k, format);
      if (matrix !== null) yield matrix;
    }
  }
  yield outlineOf([128_256], 8192, null);
}

Deno.test("every decode kernel, with every choice of autotuning, keeps to threads and workgroup memory", () => {
  let kernels = 0;
  for (const matrix of matrices()) {
    for (const limits of LIMITS) {
      for (const decode of ["codegemm", "dequantize", "int8"] as const) {
        const family = decodeFamily(matrix, { decode });
        for (const software of [false, true]) {
          const variant = defaultVariant(software);
          for (const batch of familyBatches({ ...variant, batches: BATCHES }, family)) {
            for (const choice of [{}, ...software ? [] : CANDIDATES]) {
              const made = decodeCode(
                {
                  gpu: { limits } as Gpu,
                  matrix,
                  profile: { version: 0, decode },
                  input: { stride: matrix.k, offset: 0 },
                },
                { ...variant, decode: choice },
                batch,
                { store: "store", vector: true },
              );
              if (made === null) continue;
              kernels++;
              assertFits(
                made.code,
                limits,
                `${matrix.name} ${family} x${batch} ${JSON.stringify(choice)}`,
              );
            }
          }
        }
      }
    }
  }
  assert(kernels > 1000);
});

function assertTilesFit(matrix: Matrix, limits: typeof GUARANTEED) {
  const gpu = { limits } as Gpu;
  for (const software of [false, true]) {
    const { unroll, prefillTiles } = defaultVariant(software);
    for (const decode of ["dequantize", "int8"] as const) {
      const codes = layerCodes({ matrix, profile: { version: 0, decode } });
      for (const tiles of [[...PREFILL_TILES, ...prefillTiles], []]) {
        for (const tile of holdableTiles(gpu, matrix, tiles, codes)) {
          const input = { stride: matrix.k, offset: 0 };
          const code = prefillCode({ gpu, matrix, input, store: "store" }, { unroll }, tile, codes);
          const what = `${matrix.name} ${JSON.stringify(matrix.format)} ${decode} ${
            tileName(tile)
          }`;
          assertFits(code, limits, what);
        }
      }
    }
  }
}

Deno.test("every prefill kernel, with every tile that an adapter can hold, keeps to them too", () => {
  for (const matrix of matrices()) LIMITS.forEach((limits) => assertTilesFit(matrix, limits));
});

Deno.test("codes of any length have a prefill kernel within what WebGPU guarantees", () => {
  for (let v = 1; v <= 64; v++) {
    for (const g of [v, 4 * v]) {
      assertTilesFit(matrixOf([40], 16 * v, { m: 2, v, g, b: 8 })!, GUARANTEED);
    }
  }
});

Deno.test("attention and norms of any shape keep to what WebGPU guarantees", () => {
  for (let headDim = 8; headDim <= 512; headDim += 2) {
    for (const group of [1, 2, 3, 4, 5, 7, 8, 12, 16]) {
      const shape = headShape({ heads: 2 * group, kvHeads: 2, headDim });
      const what = `${headDim} x ${group}`;
      assertFits(decodeSplitWgsl(shape, "first"), GUARANTEED, `split ${what}`);
      if (group > 1) continue;
      assertFits(decodeJoinWgsl(shape, "first"), GUARANTEED, `join ${what}`);
      assertFits(prefillWgsl(shape), GUARANTEED, `prefill ${what}`);
    }
  }
  for (const hidden of [384, 4096, 8192, 16_384, 62]) {
    assertFits(rmsnormWgsl(hidden, 1e-5, false), GUARANTEED, `norm ${hidden}`);
  }
});
