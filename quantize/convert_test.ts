import { assertEquals, assertRejects } from "@std/assert";
import {
  checkpointFiles,
  randomTensors,
  tensorBytes,
  TINY_CONFIG,
} from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { LINEAR_NAMES } from "../shared/model_config.ts";
import { randomInt, seededRandom } from "../shared/random.ts";
import { convertAqlm } from "./convert.ts";
import { reconstruct } from "./matrix.ts";
import { memoryWork } from "./work_files.ts";

const AQLM = {
  quant_method: "aqlm",
  in_group_size: 4,
  out_group_size: 1,
  num_codebooks: 2,
  nbits_per_codebook: 8,
};

/** A tiny AQLM checkpoint, and the weights that its codes stand for. */
function aqlmFiles(dtype: "I8" | "U8", section: Record<string, unknown> = AQLM) {
  const random = seededRandom(2), weights = new Map<string, Float32Array>();
  const tensors = randomTensors(TINY_CONFIG).flatMap((tensor) => {
    if (!LINEAR_NAMES.some((name) => tensor.name.endsWith(`${name}.weight`))) return [tensor];
    const matrix = tensor.name.replace(/\.weight$/, ""), [n, k] = tensor.shape;
    const codes = Uint8Array.from({ length: n * k / 4 * 2 }, () => randomInt(random, 256));
    const halves = (count: number) =>
      Float16Array.from({ length: count }, () => randomInt(random, 64) / 16 - 2);
    const books = halves(2 * 256 * 4), scales = halves(n);
    weights.set(
      matrix,
      Float32Array.from({ length: n * k }, (_, at) => {
        const vector = Math.floor(at / 4), d = at % 4;
        // The bytes of negative codes are those of code + 256.
        const sum = books[codes[vector * 2] * 4 + d] + books[(256 + codes[vector * 2 + 1]) * 4 + d];
        return sum * scales[Math.floor(at / k)];
      }),
    );
    return [
      tensorBytes(`${matrix}.codes`, dtype, [n, k / 4, 2], codes),
      tensorBytes(`${matrix}.codebooks`, "F16", [2, 256, 1, 4], new Uint8Array(books.buffer)),
      tensorBytes(`${matrix}.scales`, "F16", [n, 1, 1, 1], new Uint8Array(scales.buffer)),
    ];
  });
  const files = checkpointFiles({ ...TINY_CONFIG, quantization_config: section }, tensors);
  return { files: { ...files, "tokenizer.json": "{}" }, weights };
}

Deno.test("AQLM checkpoints become CodeGEMM ones of exactly the same weights, however codes are stored", async () => {
  const results: Uint8Array[] = [];
  for (const dtype of ["I8", "U8"] as const) {
    const { files, weights } = aqlmFiles(dtype);
    const out = new Map<string, Uint8Array<ArrayBuffer>>();
    const format = await convertAqlm(memorySource(files), memoryWork(out), 2 ** 20);
    assertEquals(format, { m: 2, v: 4, g: 16, b: 8 });
    const result = await openCheckpoint(memorySource(Object.fromEntries(out)));
    assertEquals([result.config.codegemm, result.tokenizerJson], [format, "{}"]);
    assertEquals(weights.size, 14);
    for (const [matrix, expected] of weights) {
      const read = async (kind: string) => {
        const { name, bytes } = result.info(`${matrix}.${kind}`);
        return (await result.read(name, 0, bytes)).buffer;
      };
      const [groups, n] = result.info(`${matrix}.scales`).shape;
      const decoded = reconstruct(
        {
          codes: new Uint32Array(await read("codes")),
          codebooks: new Uint16Array(await read("codebooks")),
          scales: new Uint16Array(await read("scales")),
        },
        format,
        [n, groups * format.g],
      );
      assertEquals(decoded, expected);
    }
    results.push(out.get("model-00001-of-00001.safetensors")!);
  }
  assertEquals(results[0], results[1]);
});

Deno.test("what AQLM has and CodeGEMM does not is refused by name", async () => {
  const refuse = async (section: Record<string, unknown>, words: string) => {
    const { files } = aqlmFiles("I8", { ...AQLM, ...section });
    const out = new Map<string, Uint8Array<ArrayBuffer>>();
    const error = await assertRejects(
      () => convertAqlm(memorySource(files), memoryWork(out), 2 ** 20),
      FleetError,
      words,
    );
    assertEquals([error.code, out.size], ["bad-checkpoint", 0]);
  };
  await refuse({ nbits_per_codebook: 16 }, "only codes of 8 bits");
  await refuse({ out_group_size: 8 }, "only one output row per code");
  await refuse({ quant_method: "gptq" }, "quant_method");
  await refuse({ num_codebooks: 1 }, "expected I8 or U8 [32,8,1]");
});
