/**
 * The float16 checkpoint against what the reference implementation computes with it. The test material
 * lies beside the project; without it there is nothing to compare with.
 *
 * @module
 */
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { perplexity, perplexityLimits } from "../model/perplexity.ts";
import { loadReference } from "../model/reference.ts";
import { type ChainRow, type RequestKind, StageChain, stepBatch } from "../model/stage_chain.ts";
import { type Checkpoint, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { GREEDY } from "../shared/frames.ts";

/** A prompt with what the reference implementation says of it. */
interface Golden {
  prompt_ids: number[];
  greedy_ids: number[];
  /** Token and logit, largest first. */
  first_top20: [token: number, logit: number][];
  first_logsumexp: number;
  /** Between the two largest logits, at each greedy token. */
  margins: number[];
}

const SHARED = new URL("../../shared/", import.meta.url);
const MODEL = new URL("models/story-16m/", SHARED).pathname;

function isThere(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

const ignore = !isThere(MODEL);
if (ignore) console.log(`golden tests are skipped: there is no ${MODEL}`);

const readJson = async (name: string) =>
  JSON.parse(await Deno.readTextFile(new URL(`golden/${name}`, SHARED)));

const LIMITS = { maxRows: 256, maxSequences: 4, maxOutputs: 8, pages: 48, contextTokens: 384 };
/** Held-out tokens whose perplexity is compared with plain loops. */
const HELDOUT_TOKENS = 96;
const GREEDY_ROW: RequestKind = { type: "sample", sampling: GREEDY };

/** One device for all tests: much of their time goes into compiling kernels. */
let shared: Promise<Gpu> | null = null;
globalThis.addEventListener("unload", () => void shared?.then((gpu) => gpu.close()));

async function withModel(
  test: (gpu: Gpu, checkpoint: Checkpoint, goldens: Golden[]) => Promise<void>,
): Promise<void> {
  shared ??= Gpu.open({ software: true });
  const checkpoint = await openCheckpoint(directorySource(MODEL));
  await test(await shared, checkpoint, await readJson("story-16m.json"));
}

const loadChain = (gpu: Gpu, checkpoint: Checkpoint, cuts: number[] = [], limits = LIMITS) =>
  StageChain.load({ gpu, config: checkpoint.config, tensors: checkpoint, limits, cuts });

/** Page tables of four sequences. */
const PAGES = Array.from(
  { length: 4 },
  (_, sequence) => Uint32Array.from({ length: 12 }, (_, i) => i * 4 + sequence),
);

/** A sequence's tokens as rows, `from` its position on; the last is asked for something. */
function rowsOf(sequence: number, tokens: number[], from: number, request?: RequestKind) {
  return tokens.map((token, i): ChainRow => {
    const row = { sequence, position: from + i, token };
    return request && i === tokens.length - 1 ? { ...row, request } : row;
  });
}

Deno.test({
  name: "the first logits of every golden prompt are the reference's",
  ignore,
  fn: () =>
    withModel(async (gpu, checkpoint, goldens) => {
      const chain = await loadChain(gpu, checkpoint);
      for (const [sequence, golden] of goldens.entries()) {
        const rows = rowsOf(sequence, golden.prompt_ids, 0, { type: "logits" });
        const [result] = (await chain.step(stepBatch(PAGES, rows, 0))).results;
        assert(result.type === "logits");
        let logsumexp = 0;
        for (const logit of result.logits) logsumexp += Math.exp(logit);
        const expected: [string, number, number][] = golden.first_top20.map((
          [token, logit],
        ) => [`token ${token}`, result.logits[token], logit]);
        expected.push(["log-sum-exp", Math.log(logsumexp), golden.first_logsumexp]);
        for (const [what, actual, wanted] of expected) {
          const tolerance = 0.02 + 0.005 * Math.abs(wanted);
          assertAlmostEquals(actual, wanted, tolerance, `${what}: ${actual}, not ${wanted}`);
        }
      }
      chain.destroy();
    }),
});

Deno.test({
  name: "greedy continuations of all golden prompts at once are the reference's, where it is sure",
  ignore,
  fn: () =>
    withModel(async (gpu, checkpoint, goldens) => {
      const chain = await loadChain(gpu, checkpoint);
      const generated: number[][] = goldens.map(() => []);
      const take = async (rows: ChainRow[], decodeRows: number, sequences: number[]) => {
        const { results } = await chain.step(stepBatch(PAGES, rows, decodeRows));
        results.forEach((result, i) => {
          assert(result.type === "sample");
          generated[sequences[i]].push(result.token);
        });
      };
      for (const [sequence, golden] of goldens.entries()) {
        await take(rowsOf(sequence, golden.prompt_ids, 0, GREEDY_ROW), 0, [sequence]);
      }
      for (let count = 1; count < 64; count++) {
        const rows = goldens.flatMap((golden, sequence) =>
          rowsOf(
            sequence,
            [generated[sequence][count - 1]],
            golden.prompt_ids.length + count - 1,
            GREEDY_ROW,
          )
        );
        await take(rows, rows.length, [0, 1, 2, 3]);
      }
      for (const [sequence, golden] of goldens.entries()) {
        const unsure = golden.margins.findIndex((margin) => margin < 0.05);
        const sure = unsure < 0 ? golden.greedy_ids.length : unsure;
        assertEquals(generated[sequence].slice(0, sure), golden.greedy_ids.slice(0, sure));
      }
      chain.destroy();
    }),
});

// All 16,384 tokens take minutes on a software adapter: `deno task evaluate` measures them. Here the
// start of the text is compared with plain loops, which are compared with the goldens themselves.
Deno.test({
  name: "plain loops agree with the goldens, and perplexity with the plain loops within 0.2 %",
  ignore,
  fn: () =>
    withModel(async (gpu, checkpoint, goldens) => {
      const reference = await loadReference(checkpoint.config, checkpoint);
      const [golden] = goldens;
      const first = reference.logits(golden.prompt_ids).at(-1)!;
      for (const [token, logit] of golden.first_top20) {
        assertAlmostEquals(first[token], logit, 1e-3);
      }
      const tokens: number[] = (await readJson("heldout.json")).tokens.slice(0, HELDOUT_TOKENS + 1);
      let loss = 0;
      reference.logits(tokens.slice(0, -1)).forEach((logits, i) => {
        loss += Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit), 0));
        loss -= logits[tokens[i + 1]];
      });
      const expected = Math.exp(loss / HELDOUT_TOKENS);
      const windowTokens = 512;
      const chain = await loadChain(gpu, checkpoint, [], perplexityLimits(windowTokens));
      const measured = await perplexity(chain, tokens, { windowTokens });
      assertEquals(measured.predicted, HELDOUT_TOKENS);
      assertAlmostEquals(measured.perplexity, expected, 0.002 * expected);
      chain.destroy();
    }),
});

Deno.test({
  name: "one to four stages, any chunks and any batch mates give the same bits",
  ignore,
  fn: () =>
    withModel(async (gpu, checkpoint, goldens) => {
      const [mate, , prompt] = goldens;
      const run = async (cuts: number[], chunk: number, mates: boolean) => {
        const chain = await loadChain(gpu, checkpoint, cuts);
        const company = mates ? rowsOf(1, mate.prompt_ids, 0) : [];
        const tokens = prompt.prompt_ids;
        for (let at = 0; at < tokens.length; at += chunk) {
          const rows = rowsOf(3, tokens.slice(at, at + chunk), at);
          await chain.step(stepBatch(PAGES, [...company, ...rows], 0));
        }
        const decode = rowsOf(3, prompt.greedy_ids.slice(0, 1), tokens.length, { type: "logits" });
        const { results, hidden } = await chain.step(
          stepBatch(PAGES, [...decode, ...company], decode.length),
        );
        chain.destroy();
        assert(results[0].type === "logits");
        const width = checkpoint.config.hiddenSize;
        return {
          logits: new Uint32Array(results[0].logits.slice().buffer),
          /** What leaves layers 2, 4 and 6, for the decode row. */
          hidden: hidden.map((rows) => rows.slice(0, width)),
        };
      };
      const alone = await run([], 1000, false);
      const two = await run([4], 32, true);
      const three = await run([2, 4], 7, false);
      const four = await run([2, 4, 6], 1, true);
      for (const other of [two, three, four]) assertEquals(other.logits, alone.logits);
      assertEquals(two.hidden[0], four.hidden[1]);
      assertEquals(three.hidden, four.hidden.slice(0, 2));
    }),
});
