/**
 * The embedded demo model: that it is what `models/README.md` says, and that its files fit together.
 */
import { assertEquals, assertLess } from "@std/assert";
import { reconstruct } from "../quantize/mod.ts";
import { createChatTemplate } from "../shared/chat_template.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { assertFinite, openCheckpoint, toFloat32 } from "../shared/checkpoint/mod.ts";
import { VirtualClock } from "../shared/clock.ts";
import { createTokenizer } from "../shared/tokenizer.ts";

const DEMO = new URL("../models/story-16m-m1v4g128", import.meta.url).pathname;
const ORIGINAL = new URL("../../shared/models/story-16m", import.meta.url).pathname;
const GOLDEN = new URL("../../shared/golden/story-16m.json", import.meta.url);

const open = (path: string) => openCheckpoint(directorySource(path));
const exists = (path: string | URL) => {
  try {
    return Deno.statSync(path) !== undefined;
  } catch {
    return false;
  }
};

Deno.test("the demo model is a whole CodeGEMM checkpoint of finite numbers", async () => {
  const checkpoint = await open(DEMO);
  assertEquals(checkpoint.config.codegemm, { m: 1, v: 4, g: 128, b: 8 });
  assertEquals(checkpoint.config.eosTokens, [4092, 4095]);
  let total = 0;
  for (const name of checkpoint.names()) {
    const { dtype, bytes } = checkpoint.info(name);
    assertFinite(name, dtype, await checkpoint.read(name, 0, bytes));
    total += bytes;
  }
  assertLess(total, 10e6);
});

/** Tokenizer and chat template of the demo model. */
async function textSide() {
  const checkpoint = await open(DEMO);
  const tokenizer = createTokenizer(checkpoint.tokenizerJson!, checkpoint.tokenizerConfigJson);
  const template = createChatTemplate(checkpoint.chatTemplate!, {
    bosToken: tokenizer.bosText,
    eosToken: tokenizer.eosText,
    clock: new VirtualClock(),
  });
  const chat = (content: string) =>
    template.render({ messages: [{ role: "user", content }], add_generation_prompt: true });
  return { config: checkpoint.config, tokenizer, chat };
}

Deno.test("the demo model's tokenizer and template speak to each other", async () => {
  const { config, tokenizer, chat } = await textSide();
  assertEquals(tokenizer.vocabSize, config.vocabSize);
  assertEquals(tokenizer.bosToken, config.bosToken);
  const ids = tokenizer.encode(chat("Tell me of a fox."));
  assertEquals([...ids].filter((id) => id >= 4091), [4091, 4093, 4094, 4095, 4093, 4094]);
  assertEquals(tokenizer.decode(ids), "user\n\nTell me of a fox.assistant\n\n");
});

Deno.test({
  name: "the demo tokenizer gives the reference's ids and texts (needs ../shared/golden)",
  ignore: !exists(GOLDEN),
  async fn() {
    const { tokenizer, chat } = await textSide();
    for (const { kind, text, ...golden } of JSON.parse(Deno.readTextFileSync(GOLDEN))) {
      const ids = kind === "chat"
        ? tokenizer.encode(chat(text))
        : tokenizer.encode(text, { addSpecialTokens: true });
      assertEquals([...ids], golden.prompt_ids);
      assertEquals(tokenizer.decode(golden.greedy_ids), golden.greedy_text);
    }
  },
});

Deno.test({
  name: "every matrix resembles the original, as its report says (needs ../shared/models)",
  ignore: !exists(ORIGINAL),
  async fn() {
    const [demo, original] = [await open(DEMO), await open(ORIGINAL)];
    const report = JSON.parse(await Deno.readTextFile(`${DEMO}/quantization.json`));
    assertEquals(report.blocks.length, demo.config.layers);
    for (const [layer, { matrices }] of report.blocks.entries()) {
      assertEquals(matrices.length, 7);
      for (const { name: short, errorBefore, errorAfter } of matrices) {
        assertLess(errorAfter, errorBefore, short);
        const name = `model.layers.${layer}.${short}`;
        const tensor = async (kind: string) => {
          const { name: full, bytes } = demo.info(`${name}.${kind}`);
          return (await demo.read(full, 0, bytes)).buffer;
        };
        const { dtype, bytes, shape: [n, k] } = original.info(`${name}.weight`);
        const decoded = reconstruct(
          {
            codes: new Uint32Array(await tensor("codes")),
            codebooks: new Uint16Array(await tensor("codebooks")),
            scales: new Uint16Array(await tensor("scales")),
          },
          demo.config.codegemm!,
          [n, k],
        );
        const weights = toFloat32(name, dtype, await original.read(`${name}.weight`, 0, bytes));
        let error = 0, norm = 0;
        for (let i = 0; i < weights.length; i++) {
          error += (weights[i] - decoded[i]) ** 2;
          norm += weights[i] ** 2;
        }
        // What counts is the error of the outputs: that of the weights may grow while it falls.
        assertLess(Math.sqrt(error / norm), 0.75, name);
      }
    }
  },
});
