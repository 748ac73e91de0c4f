import { assert, assertEquals, assertLess, assertRejects, assertStringIncludes } from "@std/assert";
import {
  checkpointFiles,
  floatBytes,
  randomTensors,
  TINY_CONFIG,
} from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { VirtualClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { LINEAR_NAMES } from "../shared/model_config.ts";
import { quantizeCheckpoint, type QuantizeSettings } from "./checkpoint.ts";
import { directorySink } from "./directory.ts";
import { parseFormat } from "./format.ts";
import { reconstruct } from "./matrix.ts";
import { createShardWriter, type FileSink, planShards } from "./writer.ts";

const FORMAT = parseFormat("m2v4g16");
const SETTINGS: QuantizeSettings = {
  rounds: 2,
  sampleVectors: 4096,
  seed: 1,
  keep: [],
  maxShardBytes: 16 * 1024,
};
const run = () => ({ clock: new VirtualClock() });

/** A sink whose files can be read back. */
function memorySink(): { sink: FileSink; files: Record<string, Uint8Array> } {
  const files: Record<string, Uint8Array> = {};
  return {
    files,
    sink: {
      write(name, offset, bytes) {
        const old = files[name] ?? new Uint8Array();
        files[name] = new Uint8Array(Math.max(old.length, offset + bytes.length));
        files[name].set(old);
        files[name].set(bytes, offset);
        return Promise.resolve();
      },
    },
  };
}

const openTiny = (extra: Record<string, string> = {}, tensors = randomTensors(TINY_CONFIG)) =>
  openCheckpoint(memorySource({ ...checkpointFiles(TINY_CONFIG, tensors), ...extra }));

Deno.test("a quantized checkpoint opens, stands for nearly the same weights, and keeps the rest", async () => {
  const checkpoint = await openTiny({
    "tokenizer.json": '{"a": 1}',
    "generation_config.json": '{"eos_token_id": [5]}',
    "README.md": "not copied",
  });
  const { sink, files } = memorySink();
  const seen: string[] = [];
  const report = await quantizeCheckpoint(checkpoint, FORMAT, SETTINGS, sink, {
    ...run(),
    onMatrix: ({ name }, done, total) => seen.push(`${done}/${total} ${name}`),
  });
  const result = await openCheckpoint(memorySource(files));
  assertEquals(result.config, { ...checkpoint.config, codegemm: FORMAT });
  assertEquals(result.tokenizerJson, '{"a": 1}');
  assert(!("README.md" in files));
  assert(Object.keys(files).filter((name) => name.endsWith(".safetensors")).length > 1);

  const bytesOf = (source: typeof result, name: string) =>
    source.read(name, 0, source.info(name).bytes);
  for (const name of ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]) {
    assertEquals(await bytesOf(result, name), await bytesOf(checkpoint, name));
  }
  const matrix = "model.layers.1.mlp.down_proj";
  const [n, k] = checkpoint.info(`${matrix}.weight`).shape;
  const tensor = async (kind: string) => (await bytesOf(result, `${matrix}.${kind}`)).buffer;
  const decoded = reconstruct(
    {
      codes: new Uint32Array(await tensor("codes")),
      codebooks: new Uint16Array(await tensor("codebooks")),
      scales: new Uint16Array(await tensor("scales")),
    },
    FORMAT,
    [n, k],
  );
  const weights = new Float16Array((await bytesOf(checkpoint, `${matrix}.weight`)).buffer);
  const { relativeError } = report.matrices.find(({ name }) => name === matrix)!;
  let error = 0, norm = 0;
  for (let i = 0; i < weights.length; i++) {
    error += (weights[i] - decoded[i]) ** 2;
    norm += weights[i] ** 2;
  }
  assertLess(Math.abs(Math.sqrt(error / norm) - relativeError), 1e-5);
  assertEquals(seen.length, 2 * LINEAR_NAMES.length);
  assertEquals(seen[0], "1/14 model.layers.0.self_attn.q_proj");
  assertEquals(JSON.parse(new TextDecoder().decode(files["quantization.json"])).format, "m2v4g16");
});

Deno.test("the same seed gives the same files", async () => {
  const [one, two] = [memorySink(), memorySink()];
  for (const { sink } of [one, two]) {
    await quantizeCheckpoint(await openTiny(), FORMAT, SETTINGS, sink, run());
  }
  assertEquals(one.files, two.files);
});

Deno.test("matrices to keep stay float16, and the others come out the same", async () => {
  const all = memorySink(), some = memorySink();
  const keep = ["mlp.down_proj", "layers.0"];
  await quantizeCheckpoint(await openTiny(), FORMAT, SETTINGS, all.sink, run());
  await quantizeCheckpoint(await openTiny(), FORMAT, { ...SETTINGS, keep }, some.sink, run());
  const whole = await openCheckpoint(memorySource(all.files));
  const partly = await openCheckpoint(memorySource(some.files));
  assert(partly.has("model.layers.1.mlp.down_proj.weight"));
  assert(partly.has("model.layers.0.self_attn.q_proj.weight"));
  const codes = "model.layers.1.mlp.up_proj.codes";
  const { bytes } = whole.info(codes);
  assertEquals(await partly.read(codes, 0, bytes), await whole.read(codes, 0, bytes));
});

Deno.test("what stands in the way is said before anything is written", async () => {
  const refuse = async (
    what: Promise<unknown>,
    files: Record<string, Uint8Array>,
    code: string,
    words: string,
  ) => {
    const error = await assertRejects(() => what, FleetError, words);
    assertEquals([error.code, Object.keys(files)], [code, []]);
  };
  const { sink, files } = memorySink();
  const tiny = await openTiny();
  await refuse(
    quantizeCheckpoint(tiny, parseFormat("m1v4g32"), SETTINGS, sink, run()),
    files,
    "bad-checkpoint",
    "model.layers.0.mlp.down_proj (N 32, K 48)",
  );
  for (
    const [keep, words] of [["layers", "leave no matrix"], [
      "mlp.dwn_proj",
      "--keep mlp.dwn_proj: no",
    ]]
  ) {
    await refuse(
      quantizeCheckpoint(tiny, FORMAT, { ...SETTINGS, keep: [keep] }, sink, run()),
      files,
      "bad-usage",
      words,
    );
  }
  const done = memorySink();
  await quantizeCheckpoint(tiny, FORMAT, SETTINGS, done.sink, run());
  await refuse(
    quantizeCheckpoint(
      await openCheckpoint(memorySource(done.files)),
      FORMAT,
      SETTINGS,
      sink,
      run(),
    ),
    files,
    "bad-usage",
    "already",
  );
});

Deno.test("a weight that is not finite is named before anything is written", async () => {
  const name = "model.layers.1.self_attn.o_proj.weight";
  const tensors = randomTensors(TINY_CONFIG).map((tensor) =>
    tensor.name === name
      ? { ...tensor, data: floatBytes(new Float32Array(32 * 32).fill(NaN, 40, 41), "F16") }
      : tensor
  );
  const { sink, files } = memorySink();
  const checkpoint = await openTiny({}, tensors);
  const error = await assertRejects(
    () => quantizeCheckpoint(checkpoint, FORMAT, SETTINGS, sink, run()),
    FleetError,
    `${name}: element 40`,
  );
  assertEquals(error.code, "bad-checkpoint");
  assertEquals(Object.keys(files), []);
});

Deno.test("shards are cut in order and within their size; a large tensor gets its own", () => {
  const sizes = [30, 30, 50, 200, 10];
  const tensors = sizes.map((bytes, i) => ({ name: `t${i}`, dtype: "U8", shape: [bytes], bytes }));
  const shards = planShards(tensors as Parameters<typeof planShards>[0], 100);
  assertEquals(shards.map((shard) => shard.tensors.map(({ name }) => name)), [
    ["t0", "t1"],
    ["t2"],
    ["t3"],
    ["t4"],
  ]);
  assertEquals(shards[1].file, "model-00002-of-00004.safetensors");
});

Deno.test("a tensor that was forgotten, doubled or has another size is our own mistake", async () => {
  const tensor = { name: "a", dtype: "F16" as const, shape: [2], bytes: 4 };
  const { sink } = memorySink();
  const writer = await createShardWriter(sink, [tensor], 100);
  await assertRejects(() => writer.finish(), Error, "missing: a");
  await assertRejects(() => writer.write("a", new Uint8Array(3)), Error, "size");
  await writer.write("a", new Uint8Array(4));
  await assertRejects(() => writer.write("a", new Uint8Array(4)), Error, "not written yet");
});

Deno.test("a directory that holds something is left alone", async () => {
  const path = await Deno.makeTempDir();
  try {
    const sink = await directorySink(`${path}/new/model`);
    await sink.write("a", 4, Uint8Array.of(1));
    await sink.write("a", 0, Uint8Array.of(2));
    assertEquals(await Deno.readFile(`${path}/new/model/a`), Uint8Array.of(2, 0, 0, 0, 1));
    const error = await assertRejects(() => directorySink(`${path}/new/model`), FleetError);
    assertEquals(error.code, "disk");
    assertStringIncludes(error.message, "not empty");
    await assertRejects(() => directorySink(`${path}/new/model/a/b`), FleetError, "Cannot write");
  } finally {
    await Deno.remove(path, { recursive: true });
  }
});
