import { assertAlmostEquals, assertEquals } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { perplexity, perplexityLimits } from "../model/perplexity.ts";
import { StageChain } from "../model/stage_chain.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";

const SHARED = new URL("../../shared/", import.meta.url);
const MODEL = new URL("models/story-16m/", SHARED).pathname;
const WINDOW = 512;

const ignore = await Deno.stat(MODEL).then(() => false, () => true);
if (ignore) console.log(`the held-out text is skipped: there is no ${MODEL}`);

Deno.test({
  name: "the float16 model's perplexity on the held-out text is the reference's within 0.2 %",
  ignore,
  async fn() {
    const text = await Deno.readTextFile(new URL("golden/heldout.json", SHARED));
    const heldout: { tokens: number[]; ppl: number; predicted: number } = JSON.parse(text);
    const checkpoint = await openCheckpoint(directorySource(MODEL));
    const gpu = await Gpu.open({ software: true });
    const chain = await StageChain.load({
      gpu,
      config: checkpoint.config,
      tensors: checkpoint,
      limits: perplexityLimits(WINDOW),
    });
    const measured = await perplexity(chain, heldout.tokens, { windowTokens: WINDOW });
    chain.destroy();
    gpu.close();
    assertEquals(measured.predicted, heldout.predicted);
    assertAlmostEquals(measured.perplexity, heldout.ppl, 0.002 * heldout.ppl);
  },
});
