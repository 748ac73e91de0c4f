/**
 * `evaluate`: perplexity of a checkpoint over a file of token ids.
 *
 * @module
 */
import { directorySource } from "../shared/checkpoint/directory.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { Gpu } from "../kernels/gpu.ts";
import { perplexity, perplexityLimits } from "../model/perplexity.ts";
import { StageChain } from "../model/stage_chain.ts";

/** Token ids from `{"tokens": [...]}`. */
async function readTokens(path: string): Promise<number[]> {
  let tokens: unknown;
  try {
    tokens = JSON.parse(await Deno.readTextFile(path)).tokens;
  } catch (cause) {
    throw new FleetError("bad-usage", `Cannot read token ids from ${path}: ${cause}`, { cause });
  }
  if (!Array.isArray(tokens) || !tokens.every((token) => Number.isInteger(token))) {
    throw new FleetError("bad-usage", `${path} has no array of token ids named "tokens"`);
  }
  return tokens;
}

if (import.meta.main) {
  await runCommand(async () => {
    const { values: flags } = parseFlags({
      command: "evaluate",
      summary: "Measures the perplexity of a checkpoint over a text given as token ids.",
      flags: {
        model: { type: "string", required: true, help: "directory of the checkpoint" },
        tokens: { type: "string", required: true, help: 'JSON file with an array "tokens"' },
        window: { type: "integer", default: 512, min: 1, help: "tokens predicted per window" },
        max: { type: "integer", min: 1, help: "predicted tokens to stop at" },
        software: { type: "boolean", help: "run on the CPU where there is no GPU" },
      },
    });
    const tokens = await readTokens(flags.tokens);
    const checkpoint = await openCheckpoint(directorySource(flags.model));
    const gpu = await Gpu.open({ software: flags.software });
    try {
      const chain = await StageChain.load({
        gpu,
        config: checkpoint.config,
        tensors: checkpoint,
        limits: perplexityLimits(flags.window),
      });
      const startedMs = performance.now();
      const result = await perplexity(chain, tokens, {
        windowTokens: flags.window,
        maxTokens: flags.max,
        onProgress: (predicted, total) => {
          if (predicted % (16 * flags.window) === 0) {
            console.error(`${predicted} of ${total} tokens`);
          }
        },
      });
      const seconds = (performance.now() - startedMs) / 1000;
      console.log(
        `perplexity ${result.perplexity.toFixed(4)} over ${result.predicted} tokens ` +
          `(windows of ${flags.window}), ${(result.predicted / seconds).toFixed(0)} tokens/s`,
      );
      chain.destroy();
    } finally {
      gpu.close();
    }
  });
}
