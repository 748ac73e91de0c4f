import { assert, assertAlmostEquals, assertEquals, assertRejects } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { perplexity, perplexityLimits, StageChain } from "../model/mod.ts";
import { loadReference } from "../model/reference.ts";
import { checkpointFiles, randomTensors, TINY_CONFIG } from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { randomInt, seededRandom } from "../shared/random.ts";
import { evaluateTable } from "./evaluate.ts";
import { divergenceOf, judge, predictionOf } from "./judge.ts";
import { readTokenFile } from "./token_file.ts";

Deno.test("divergence is that of the distributions: 0 from itself, and not symmetric", () => {
  const p = predictionOf(Float32Array.of(Math.log(0.5), Math.log(0.25), Math.log(0.25)));
  const q = predictionOf(
    Float32Array.of(3 + Math.log(0.25), 3 + Math.log(0.5), 3 + Math.log(0.25)),
  );
  assertAlmostEquals(divergenceOf(p, p), 0, 1e-12);
  assertAlmostEquals(divergenceOf(p, q), 0.25 * Math.log(2), 1e-6);
  assertEquals([p.top, q.top], [0, 1]);
});

Deno.test("a model is judged as plain loops judge it", async () => {
  const open = (seed: number) =>
    openCheckpoint(
      memorySource(checkpointFiles(TINY_CONFIG, randomTensors(TINY_CONFIG, "F16", seed))),
    );
  const [one, two] = [await open(1), await open(2)];
  const random = seededRandom(3), windowTokens = 10;
  const tokens = Uint32Array.from({ length: 25 }, () => randomInt(random, 64));
  const [model, reference] = await Promise.all(
    [one, two].map((checkpoint) => loadReference(checkpoint.config, checkpoint)),
  );
  let loss = 0, divergence = 0, agreed = 0;
  for (let at = 0; at < 24; at += windowTokens) {
    const window = tokens.subarray(at, Math.min(at + windowTokens, 24));
    const rows = (source: typeof model) =>
      source.logits(window).map((logits) => predictionOf(Float32Array.from(logits)));
    const [ours, theirs] = [rows(model), rows(reference)];
    window.forEach((_, i) => {
      loss += ours[i].shift - ours[i].logits[tokens[at + i + 1]];
      divergence += divergenceOf(theirs[i], ours[i]);
      agreed += ours[i].top === theirs[i].top ? 1 : 0;
    });
  }
  const gpu = await Gpu.open({ software: true });
  try {
    const load = (checkpoint: typeof one) =>
      StageChain.load({
        gpu,
        config: checkpoint.config,
        tensors: checkpoint,
        limits: perplexityLimits(windowTokens),
      });
    const [ours, theirs] = [await load(one), await load(two)];
    const result = await judge(ours, theirs, tokens, 64, { windowTokens });
    assertAlmostEquals(result.perplexity, Math.exp(loss / 24), 0.005 * result.perplexity);
    assertAlmostEquals(result.divergence, divergence / 24, 0.01 * result.divergence);
    assert(Math.abs(result.agreement - agreed / 24) <= 1 / 24);
    const alone = await perplexity(ours, tokens, { windowTokens });
    assertAlmostEquals(alone.perplexity, result.perplexity, 1e-3 * result.perplexity);
    const same = await judge(ours, ours, tokens, 64, { windowTokens, maxTokens: 12 });
    assertEquals([same.agreement, same.predicted], [1, 12]);
    assertAlmostEquals(same.divergence, 0, 1e-9);
    ours.destroy();
    theirs.destroy();
  } finally {
    gpu.close();
  }
});

Deno.test("the table has a line per model, and columns only for what was measured", () => {
  const row = { model: "a", format: "float", bytes: 31e6, perplexity: 17.63, tokensPerSecond: 100 };
  assertEquals(
    evaluateTable([row]),
    "| model | format | MB | perplexity | tokens/s |\n| --- | --- | --- | --- | --- |\n" +
      "| a | float | 31.0 | 17.630 | 100 |",
  );
  const compared = evaluateTable([{ ...row, agreement: 0.5, divergence: 0.25 }]);
  assertEquals(compared.split("\n")[2], "| a | float | 31.0 | 17.630 | 50.0 % | 0.2500 | 100 |");
});

Deno.test("token files are read as they are written, and named when they are something else", async () => {
  const path = await Deno.makeTempDir();
  const put = async (name: string, bytes: Uint8Array | string) => {
    const file = `${path}/${name}`;
    await Deno.writeFile(file, typeof bytes === "string" ? new TextEncoder().encode(bytes) : bytes);
    return file;
  };
  try {
    const ids = [1, 300, 65535];
    const u16 = await put("a.u16", new Uint8Array(Uint16Array.from(ids).buffer));
    assertEquals([...await readTokenFile(u16)], ids);
    const u32 = await put("a.u32", new Uint8Array(Uint32Array.from(ids).buffer));
    assertEquals([...await readTokenFile(u32)], ids);
    const json = await put("a.json", JSON.stringify({ tokens: ids }));
    assertEquals([...await readTokenFile(json)], ids);
    const refuse = async (name: string, bytes: Uint8Array | string, words: string) => {
      const file = await put(name, bytes);
      const error = await assertRejects(() => readTokenFile(file), FleetError, words);
      assertEquals(error.code, "bad-usage");
    };
    await refuse("b.u16", new Uint8Array(3), "no whole u16");
    await refuse("b.json", '{"tokens": [1, -2]}', 'no array "tokens"');
    await refuse("b.txt", "Once upon a time", "neither");
    await assertRejects(() => readTokenFile(`${path}/none`), FleetError, "cannot be read");
  } finally {
    await Deno.remove(path, { recursive: true });
  }
});
