import { assert, assertEquals, assertRejects } from "@std/assert";
import { dequantize, readCodeTensors } from "../kernels/linear/reference.ts";
import { randomTensors, tensorBytes, TINY_CONFIG } from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint, type TensorBytes } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { ROW_SCALE } from "../shared/model_config.ts";
import {
  type AqlmFixture,
  aqlmFixture,
  type AqlmFormat,
  type AqlmOptions,
} from "./aqlm_fixture.ts";
import { convertAqlm, type ConvertRun } from "./convert.ts";
import { memoryWork } from "./work_files.ts";

const MATRICES = 14;

const aqlmFiles = (format: AqlmFormat, options?: AqlmOptions) =>
  aqlmFixture(TINY_CONFIG, format, options);

async function convert(files: AqlmFixture["files"]): Promise<Map<string, Uint8Array<ArrayBuffer>>> {
  const out = new Map<string, Uint8Array<ArrayBuffer>>();
  await convertAqlm(memorySource(files), memoryWork(out), 2 ** 30);
  return out;
}

for (
  const [aqlm, storages] of [
    [{ m: 2, v: 4, b: 8 }, ["signed", "unsigned"]],
    [{ m: 1, v: 8, b: 16 }, ["signed", "unsigned"]],
    [{ m: 2, v: 8, b: 11 }, ["signed"]],
  ] as const
) {
  const name = `${aqlm.m}x${aqlm.b} of ${aqlm.v} weights`;
  Deno.test(`AQLM checkpoints become ones of exactly the same weights: ${name}`, async () => {
    const results: Uint8Array[] = [];
    for (const storage of storages) {
      const { files, weights } = aqlmFiles(aqlm, { unsigned: storage === "unsigned" });
      const out = await convert(files);
      const result = await openCheckpoint(memorySource(Object.fromEntries(out)));
      const format = { ...aqlm, g: ROW_SCALE };
      assertEquals([result.config.codegemm, result.tokenizerJson], [format, "{}"]);
      assert(!result.configJson.includes("quantization_config"));
      assertEquals(weights.size, MATRICES);
      for (const [matrix, expected] of weights) {
        const [, n] = result.info(`${matrix}.scales`).shape;
        const shape = [n, expected.length / n] as const;
        const decoded = dequantize(await readCodeTensors(result, matrix, shape, format));
        // Zeros of either sign are equal weights.
        assertEquals(decoded.map((weight) => weight + 0), expected.map((weight) => weight + 0));
      }
      results.push(out.get("model-00001-of-00001.safetensors")!);
    }
    for (const other of results) assertEquals(other, results[0]);
  });
}

Deno.test("matrices that AQLM left as they were stay so", async () => {
  const kept = "model.layers.1.mlp.up_proj";
  const plain = randomTensors(TINY_CONFIG).find(({ name }) => name === `${kept}.weight`)!;
  const { files } = aqlmFiles({ m: 2, v: 4, b: 8 }, {
    change: (tensors) => [...tensors.filter(({ name }) => !name.startsWith(kept)), plain],
  });
  const out = await openCheckpoint(memorySource(Object.fromEntries(await convert(files))));
  assertEquals(await out.read(plain.name, 0, plain.bytes), new Uint8Array(plain.data));
});

Deno.test("what AQLM has and cannot run is refused by name, before anything is written", async () => {
  const refuse = async (words: string, options: AqlmOptions, b = 8) => {
    const { files } = aqlmFiles({ m: b > 8 ? 1 : 2, v: 4, b }, options);
    const out = new Map<string, Uint8Array<ArrayBuffer>>();
    const error = await assertRejects(
      () => convertAqlm(memorySource(files), memoryWork(out), 2 ** 20),
      FleetError,
      words,
    );
    assertEquals([error.code, out.size], ["bad-checkpoint", 0]);
  };
  const q = "model.layers.0.self_attn.q_proj";
  const changed = (name: string, change: Partial<TensorBytes>) => (tensors: TensorBytes[]) =>
    tensors.map((tensor) => tensor.name === name ? { ...tensor, ...change } : tensor);
  await refuse("only codes of 8 to 16 bits", { section: { nbits_per_codebook: 17 } });
  await refuse("only codes of 8 to 16 bits", { section: { nbits_per_codebook: 7 } });
  await refuse("only one output row per code", { section: { out_group_size: 8 } });
  await refuse("quant_method", { section: { quant_method: "gptq" } });
  await refuse("expected I8 or U8 [32,8,1]", { section: { num_codebooks: 1 } });
  await refuse("expected I16 or U16 [32,8,2]", { section: { nbits_per_codebook: 16 } });
  await refuse("codes is F16 [32,8,1]; expected I16 or U16", {
    change: changed(`${q}.codes`, { dtype: "F16" }),
  }, 9);
  await refuse(`${q}.codebooks is I8`, {
    change: changed(`${q}.codebooks`, { dtype: "I8", shape: [2, 256, 2, 4] }),
  });
  await refuse(`${q}.scales is missing`, {
    change: (tensors) => tensors.filter(({ name }) => name !== `${q}.scales`),
  });
  await refuse("model.norm.weight (32) is missing", {
    change: (tensors) => tensors.filter(({ name }) => name !== "model.norm.weight"),
  });
  await refuse(`${q}.bias`, {
    change: (tensors) => [...tensors, tensorBytes(`${q}.bias`, "F16", [1], new Uint8Array(2))],
  });
  await refuse(`${q}.codes is 2 x 2 x 16; config.json asks for 2 x 2 x 32`, {
    change: (tensors) =>
      tensors.map((tensor) => {
        if (!tensor.name.startsWith(q) || tensor.name.endsWith("codebooks")) return tensor;
        const { name, dtype, shape, bytes, data } = tensor;
        const half = data.slice(0, bytes / 2);
        return tensorBytes(name, dtype, [shape[0] / 2, ...shape.slice(1)], half);
      }),
  });
});

Deno.test("how much will be written is told before any of it is", async () => {
  const { files } = aqlmFiles({ m: 2, v: 4, b: 8 });
  const out = new Map<string, Uint8Array<ArrayBuffer>>();
  let planned = 0;
  const onPlanned = (bytes: number) => {
    planned = bytes;
    return Promise.reject(new FleetError("disk", "too full"));
  };
  const make = (run: ConvertRun) => convertAqlm(memorySource(files), memoryWork(out), 2 ** 30, run);
  await assertRejects(() => make({ onPlanned }), FleetError, "too full");
  assertEquals(out.size, 0);
  await make({});
  const { size } = new Blob([out.get("model-00001-of-00001.safetensors")!]);
  assert(planned > 0.8 * size && planned < size, `${planned} of ${size} with the header`);
});

Deno.test("a checkpoint that is none of AQLM's is told what to do with it", async () => {
  const refuse = async (config: string, words: string) => {
    const error = await assertRejects(() => convert({ "config.json": config }), FleetError, words);
    assertEquals(error.code, "bad-checkpoint");
  };
  await refuse(JSON.stringify(TINY_CONFIG), "no AQLM checkpoint; deno task quantize");
  await refuse(JSON.stringify({ ...TINY_CONFIG, codegemm: {} }), "runs as it is");
  await refuse("{", "config.json is not JSON");
});

Deno.test("a code that its bits do not hold is found", async () => {
  const name = "model.layers.1.mlp.down_proj.codes";
  const { files } = aqlmFiles({ m: 1, v: 4, b: 12 }, {
    change: (tensors) => {
      const codes = tensors.find((tensor) => tensor.name === name)!;
      new Int16Array(codes.data.buffer)[77] = 4096;
      return tensors;
    },
  });
  const error = await assertRejects(() => convert(files), FleetError, `${name}: element 77`);
  assertEquals(error.code, "bad-checkpoint");
});
