import {
  assert,
  assertEquals,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { FleetError } from "../errors.ts";
import { stageParts } from "../model_config.ts";
import { directorySource } from "./directory.ts";
import { checkpointFiles, randomTensors, TINY_CONFIG } from "./fixture.ts";
import { allParts, partTensors } from "./layout.ts";
import { openCheckpoint } from "./open.ts";
import { encodeSafetensors, type TensorBytes } from "./safetensors.ts";
import { memorySource } from "./source.ts";

const INDEX = "model.safetensors.index.json";
const CODEGEMM = {
  group_size: 16,
  vec_len: 4,
  num_codebooks: 2,
  nbits_per_codebook: 8,
  arch_config: {},
};
const QUANTIZED = { ...TINY_CONFIG, codegemm: CODEGEMM };
const DOWN = "model.layers.1.mlp.down_proj";

const open = (files: Record<string, Uint8Array | string>) => openCheckpoint(memorySource(files));

async function refused(
  files: Record<string, Uint8Array | string>,
  ...words: string[]
): Promise<void> {
  const error = await assertRejects(() => open(files), FleetError);
  assertEquals(error.code, "bad-checkpoint");
  for (const word of words) assertStringIncludes(error.message, word);
}

/** The tiny checkpoint in two shards, with an index. */
function sharded(tensors = randomTensors(TINY_CONFIG)): Record<string, Uint8Array | string> {
  const half = Math.floor(tensors.length / 2);
  const shards = { "a.safetensors": tensors.slice(0, half), "b.safetensors": tensors.slice(half) };
  const files: Record<string, Uint8Array | string> = { "config.json": JSON.stringify(TINY_CONFIG) };
  const map: Record<string, string> = {};
  for (const [file, inside] of Object.entries(shards)) {
    files[file] = encodeSafetensors(inside);
    for (const { name } of inside) map[name] = file;
  }
  files[INDEX] = JSON.stringify({ metadata: {}, weight_map: map });
  return files;
}

function replaced(tensors: TensorBytes[], name: string, change: Partial<TensorBytes>) {
  assert(tensors.some((tensor) => tensor.name === name));
  return tensors.map((tensor) => tensor.name === name ? { ...tensor, ...change } : tensor);
}

Deno.test("a single file and shards with an index give the same tensors", async () => {
  const tensors = randomTensors(TINY_CONFIG);
  const one = await open(checkpointFiles(TINY_CONFIG, tensors));
  const two = await open(sharded(tensors));
  assertEquals(one.names().sort(), two.names().sort());
  for (const { name, dtype, shape, bytes, data } of tensors) {
    for (const checkpoint of [one, two]) {
      assertEquals(checkpoint.info(name), { name, dtype, shape, bytes });
      assertEquals(await checkpoint.read(name, 0, bytes), data);
      assertEquals(await checkpoint.read(name, 4, 10), data.slice(4, 14));
    }
  }
  assertEquals(one.config.layers, 2);
  assertEquals(one.configJson, JSON.stringify(TINY_CONFIG));
});

Deno.test("float32 and bfloat16 checkpoints open too, and tied embeddings need no head", async () => {
  for (const dtype of ["F32", "BF16"] as const) {
    const checkpoint = await open(checkpointFiles(TINY_CONFIG, randomTensors(TINY_CONFIG, dtype)));
    assertEquals(checkpoint.info("model.norm.weight").dtype, dtype);
  }
  const tied = { ...TINY_CONFIG, tie_word_embeddings: true };
  const checkpoint = await open(checkpointFiles(tied));
  assert(!checkpoint.has("lm_head.weight"));
  assertEquals(partTensors(checkpoint.config, "head", checkpoint.has), [
    "model.norm.weight",
    "model.embed_tokens.weight",
  ]);
});

Deno.test("the parts of a model name each tensor once", async () => {
  for (const config of [TINY_CONFIG, QUANTIZED]) {
    const checkpoint = await open(checkpointFiles(config));
    const names = allParts(checkpoint.config)
      .flatMap((part) => partTensors(checkpoint.config, part, checkpoint.has));
    assertEquals(names.toSorted(), checkpoint.names().sort());
    assertEquals(
      stageParts({ from: 0, to: 2, first: true, last: true }),
      allParts(checkpoint.config),
    );
  }
});

Deno.test("a quantized checkpoint may keep single matrices as they were", async () => {
  const kept = randomTensors(TINY_CONFIG).filter(({ name }) => name === `${DOWN}.weight`);
  const tensors = randomTensors(QUANTIZED).filter(({ name }) => !name.startsWith(`${DOWN}.`));
  const checkpoint = await open(checkpointFiles(QUANTIZED, [...tensors, ...kept]));
  const names = partTensors(checkpoint.config, "layer.1", checkpoint.has);
  assert(names.includes(`${DOWN}.weight`) && !names.includes(`${DOWN}.codes`));
  assert(names.includes("model.layers.1.mlp.up_proj.codes"));
});

Deno.test("the texts beside the tensors come along", async () => {
  const base = checkpointFiles(TINY_CONFIG);
  const bare = await open(base);
  assertEquals([bare.tokenizerJson, bare.tokenizerConfigJson, bare.chatTemplate], [
    undefined,
    undefined,
    undefined,
  ]);
  const config = (template: unknown) => JSON.stringify({ chat_template: template });
  const named = [{ name: "tool_use", template: "T" }, { name: "default", template: "D" }];
  for (
    const [files, template] of [
      [{ "tokenizer_config.json": config("A") }, "A"],
      [{ "tokenizer_config.json": config(named) }, "D"],
      [{ "tokenizer_config.json": config(named.slice(0, 1)) }, undefined],
      [{ "tokenizer_config.json": config("A"), "chat_template.jinja": "B" }, "B"],
      [{ "tokenizer.json": "{}" }, undefined],
    ] as [Record<string, string>, string | undefined][]
  ) {
    const checkpoint = await open({ ...base, ...files });
    assertEquals(checkpoint.chatTemplate, template);
    assertEquals(checkpoint.tokenizerJson, files["tokenizer.json"]);
  }
  const generation = { "generation_config.json": JSON.stringify({ eos_token_id: [7] }) };
  assertEquals((await open({ ...base, ...generation })).config.eosTokens, [2, 7]);
  await refused({ ...base, "tokenizer_config.json": "[" }, "tokenizer_config.json is not JSON");
  await refused({ ...base, "tokenizer_config.json": config(3) }, "tokenizer_config.json");
});

Deno.test("missing files are named", async () => {
  const files = checkpointFiles(TINY_CONFIG);
  await refused({ "model.safetensors": files["model.safetensors"] }, "no config.json");
  await refused({ "config.json": files["config.json"] }, "neither", INDEX, "model.safetensors");
  const { "b.safetensors": _, ...rest } = sharded();
  await refused(rest, "b.safetensors is missing", INDEX, "model.layers");
});

Deno.test("an index that lies", async () => {
  const files = sharded();
  const index = (map: unknown) => ({ ...files, [INDEX]: JSON.stringify({ weight_map: map }) });
  const map = JSON.parse(files[INDEX] as string).weight_map;
  await refused({ ...files, [INDEX]: "{" }, `${INDEX} is not JSON`);
  await refused(index(undefined), "no weight_map");
  await refused(index({ ...map, "lm_head.weight": "../b.safetensors" }), "lm_head.weight", "..");
  await refused(index({ ...map, "lm_head.weight": 3 }), "lm_head.weight");
  await refused(
    index({ ...map, "lm_head.weight": "a.safetensors" }),
    "a.safetensors does not hold lm_head.weight",
  );
  const { "model.norm.weight": _, ...less } = map;
  await refused(index(less), "model.norm.weight", "missing");
});

Deno.test("a truncated shard is refused at once, by name", async () => {
  const files = sharded();
  const cut = (files["b.safetensors"] as Uint8Array).slice(0, -5);
  await refused({ ...files, "b.safetensors": cut }, "b.safetensors", "truncated");
});

Deno.test("a config that does not match its tensors names the tensor and both shapes", async () => {
  const tensors = randomTensors(TINY_CONFIG);
  const with_ = (changes: Record<string, unknown>) =>
    checkpointFiles({ ...TINY_CONFIG, ...changes }, tensors);
  await refused(with_({ vocab_size: 65 }), "model.embed_tokens.weight", "64 x 32", "65 x 32");
  await refused(with_({ intermediate_size: 49 }), "mlp.gate_proj", "48 x 32", "49 x 32");
  await refused(with_({ num_key_value_heads: 4 }), "k_proj.weight", "16 x 32", "32 x 32");
  await refused(with_({ num_hidden_layers: 3 }), "model.layers.2.", "missing");
  await refused(with_({ num_hidden_layers: 1 }), "model.layers.1.", "1 layers only");
  await refused(with_({ codegemm: CODEGEMM, num_hidden_layers: 1 }), "model.layers.1.");
  await refused(
    checkpointFiles(TINY_CONFIG, tensors.filter(({ name }) => name !== "lm_head.weight")),
    "lm_head.weight (64 x 32) is missing",
  );
});

Deno.test("tensors of a wrong type, biases, and both kinds of one matrix", async () => {
  const dense = randomTensors(TINY_CONFIG), quantized = randomTensors(QUANTIZED);
  const norm = "model.norm.weight", codes = `${DOWN}.codes`;
  await refused(
    checkpointFiles(TINY_CONFIG, replaced(dense, norm, { dtype: "I16" })),
    norm,
    "I16",
    "F16 or BF16 or F32",
  );
  await refused(
    checkpointFiles(QUANTIZED, replaced(quantized, codes, { dtype: "F32" })),
    codes,
    "F32",
    "I32",
  );
  const bias = {
    name: `${DOWN}.bias`,
    dtype: "F16",
    shape: [1],
    bytes: 2,
    data: new Uint8Array(2),
  };
  await refused(
    checkpointFiles(TINY_CONFIG, [...dense, bias as TensorBytes]),
    `${DOWN}.bias`,
    "biases",
  );
  const weight = dense.find(({ name }) => name === `${DOWN}.weight`)!;
  await refused(checkpointFiles(QUANTIZED, [...quantized, weight]), `${DOWN}.codes`, ".weight too");
  await refused(checkpointFiles(TINY_CONFIG, quantized), ".codes", "no codegemm section");
});

Deno.test("a format that does not suit a matrix names the matrix and the rule", async () => {
  const tensors = randomTensors(QUANTIZED);
  const format = (changes: Record<string, number>) =>
    checkpointFiles({ ...TINY_CONFIG, codegemm: { ...CODEGEMM, ...changes } }, tensors);
  const first = "model.layers.0.self_attn.q_proj";
  await refused(format({ nbits_per_codebook: 17 }), first, "17 bits");
  await refused(format({ nbits_per_codebook: 7 }), first, "7 bits");
  await refused(format({ vec_len: 32, nbits_per_codebook: 12 }), first, "2 v = 64");
  await refused(format({ num_codebooks: 17 }), first, "16 codebooks");
  await refused(format({ group_size: -1 }), `${first}.scales`, "2 x 32", "1 x 32");
  await refused(format({ vec_len: 16 }), first, "4 v = 64");
  await refused(format({ group_size: 6 }), first, "g = 6");
  await refused(format({ group_size: 64 }), first, "g = 64");
  await refused(format({ group_size: 32 }), "model.layers.0.mlp.down_proj", "g = 32");
  await refused(format({ num_codebooks: 3 }), `${first}.codes`, "2 x 2 x 32", "3 x 2 x 32");
});

Deno.test("a tensor that is not there is an error, not undefined", async () => {
  const checkpoint = await open(checkpointFiles(TINY_CONFIG));
  assertThrows(() => checkpoint.info("nope"), FleetError, "nope");
  await assertRejects(() => checkpoint.read("nope", 0, 1), FleetError, "nope");
  await assertRejects(() => checkpoint.read("model.norm.weight", 60, 5), Error, "slice");
});

Deno.test("a directory is read in slices, and what is wrong with it is said by path", async () => {
  const path = await Deno.makeTempDir();
  try {
    for (const [name, content] of Object.entries(sharded())) {
      const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
      await Deno.writeFile(`${path}/${name}`, bytes);
    }
    await Deno.mkdir(`${path}/original`);
    const files = directorySource(path);
    assertEquals(await files.list(), ["a.safetensors", "b.safetensors", "config.json", INDEX]);
    const checkpoint = await openCheckpoint(files);
    const expected = await open(sharded());
    for (const name of checkpoint.names()) {
      const { bytes } = checkpoint.info(name);
      assertEquals(
        await checkpoint.read(name, 1, bytes - 1),
        await expected.read(name, 1, bytes - 1),
      );
    }
    await Deno.truncate(`${path}/a.safetensors`, 5000);
    const last = [...checkpoint.names()].findLast((name) => name.includes("layers.0"))!;
    const cut = await assertRejects(
      () => checkpoint.read(last, 0, 64),
      FleetError,
      "a.safetensors",
    );
    assertEquals(cut.code, "bad-checkpoint");
    await assertRejects(() => files.read("nope", 0, 1), FleetError, `There is no ${path}/nope`);
    const nowhere = directorySource(`${path}/nowhere`);
    const missing = await assertRejects(() => openCheckpoint(nowhere), FleetError, "nowhere");
    assertEquals(missing.code, "not-found");
  } finally {
    await Deno.remove(path, { recursive: true });
  }
});

Deno.test("files beyond 4 GiB are read at the right place", async () => {
  const path = await Deno.makeTempDir();
  try {
    // A hole: it takes no room on the disk.
    const offset = 5 * 2 ** 30;
    using file = await Deno.open(`${path}/large`, { write: true, create: true });
    await file.seek(offset, Deno.SeekMode.Start);
    await file.write(Uint8Array.of(1, 2, 3));
    const files = directorySource(path);
    assertEquals(await files.size("large"), offset + 3);
    assertEquals(await files.read("large", offset - 1, 4), Uint8Array.of(0, 1, 2, 3));
  } finally {
    await Deno.remove(path, { recursive: true });
  }
});
