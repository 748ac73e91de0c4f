import { assertAlmostEquals, assertEquals, assertNotEquals } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { type Perplexity, perplexity, perplexityLimits } from "../model/perplexity.ts";
import { StageChain } from "../model/stage_chain.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";
import { type NumericsProfile, PROFILE_VERSION } from "../shared/protocol.ts";

const SHARED = new URL("../../shared/", import.meta.url);
const MODEL = new URL("models/story-16m/", SHARED).pathname;
const DEMO = new URL("../models/story-16m-m1v4g128/", import.meta.url).pathname;
const WINDOW = 512;

const ignore = await Deno.stat(MODEL).then(() => false, () => true);
if (ignore) console.log(`the held-out text is skipped: there is no ${MODEL}`);

interface Heldout {
  tokens: number[];
  ppl: number;
  predicted: number;
}

async function readHeldout(): Promise<Heldout> {
  return JSON.parse(await Deno.readTextFile(new URL("golden/heldout.json", SHARED)));
}

/** The perplexity of a checkpoint in one stage, with the kernels of a family. */
async function measure(
  path: string,
  tokens: number[],
  decode: NumericsProfile["decode"] = "codegemm",
): Promise<Perplexity> {
  const checkpoint = await openCheckpoint(directorySource(path));
  const gpu = await Gpu.open({ software: true });
  const chain = await StageChain.load({
    gpu,
    config: checkpoint.config,
    tensors: checkpoint,
    limits: perplexityLimits(WINDOW),
    profile: { version: PROFILE_VERSION, decode },
  });
  const measured = await perplexity(chain, tokens, { windowTokens: WINDOW });
  chain.destroy();
  gpu.close();
  return measured;
}

Deno.test({
  name: "the float16 model's perplexity on the held-out text is the reference's within 0.2 %",
  ignore,
  async fn() {
    const { tokens, ppl, predicted } = await readHeldout();
    const measured = await measure(MODEL, tokens);
    assertEquals(measured.predicted, predicted);
    assertAlmostEquals(measured.perplexity, ppl, 0.002 * ppl);
  },
});

Deno.test({
  name: "eight-bit integers move the demo model's perplexity by less than 1 %",
  ignore,
  async fn() {
    const { tokens } = await readHeldout();
    const some = tokens.slice(0, WINDOW + 1);
    const [exact, int8] = [await measure(DEMO, some), await measure(DEMO, some, "int8")];
    assertNotEquals(int8.perplexity, exact.perplexity);
    assertAlmostEquals(int8.perplexity, exact.perplexity, 0.01 * exact.perplexity);
  },
});
