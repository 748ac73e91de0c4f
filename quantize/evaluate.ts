/**
 * `deno task evaluate --model DIR --tokens FILE [--reference DIR]`: perplexity of checkpoints, and how
 * far their predictions are from a reference's.
 *
 * @module
 */
import { resolve } from "node:path";
import { type Checkpoint, formatName, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { type NumericsProfile, PROFILE_VERSION } from "../shared/protocol.ts";
import { Gpu } from "../kernels/gpu.ts";
import { perplexity, perplexityLimits, StageChain } from "../model/mod.ts";
import { judge, type JudgeOptions } from "./judge.ts";
import { readTokenFile } from "./token_file.ts";

/** A line of the table. */
export interface EvaluateRow {
  model: string;
  format: string;
  /** Of all tensors. */
  bytes: number;
  perplexity: number;
  agreement?: number;
  divergence?: number;
  tokensPerSecond: number;
}

/** The table, in Markdown; columns that no row fills are left out. */
export function evaluateTable(rows: readonly EvaluateRow[]): string {
  const compared = rows.some((row) => row.divergence !== undefined);
  const head = ["model", "format", "MB", "perplexity"];
  const lines = rows.map((row) => [
    row.model,
    row.format,
    (row.bytes / 1e6).toFixed(1),
    row.perplexity.toFixed(3),
    ...(compared
      ? [
        row.agreement === undefined ? "" : `${(100 * row.agreement).toFixed(1)} %`,
        row.divergence === undefined ? "" : row.divergence.toFixed(4),
      ]
      : []),
    row.tokensPerSecond.toFixed(0),
  ]);
  if (compared) head.push("same top token", "mean KL");
  head.push("tokens/s");
  const line = (cells: string[]) => `| ${cells.join(" | ")} |`;
  return [line(head), line(head.map(() => "---")), ...lines.map(line)].join("\n");
}

if (import.meta.main) {
  await runCommand(async () => {
    const { values: flags } = parseFlags({
      command: "evaluate",
      summary: "Measures how well checkpoints predict a text given as token ids.",
      flags: {
        model: {
          type: "string",
          required: true,
          help: "directory of the checkpoint; several with commas between",
        },
        tokens: {
          type: "path",
          required: true,
          help: "token ids: .u16, .u32, or JSON with an array tokens",
        },
        reference: {
          type: "path",
          help: "directory of a checkpoint whose predictions are the measure, the float one say",
        },
        window: {
          type: "integer",
          default: 512,
          min: 1,
          help: "tokens predicted before the context starts anew",
        },
        max: { type: "integer", min: 1, help: "predicted tokens to stop at" },
        int8: {
          type: "boolean",
          help:
            "multiply in eight-bit integers, as a fleet with --decode int8 does; not the reference",
        },
        software: { type: "boolean", help: "run on the CPU where there is no GPU" },
      },
    });
    const tokens = await readTokenFile(flags.tokens);
    const open = (path: string) => openCheckpoint(directorySource(path));
    const names = flags.model.split(",").filter(Boolean);
    if (names.length === 0) throw new FleetError("bad-usage", "--model names no directory");
    const reference = flags.reference === undefined ? null : await open(flags.reference);
    // All of them now, not after the first has been measured.
    const models: { name: string; path: string; checkpoint: Checkpoint }[] = [];
    for (const name of names) {
      const path = resolve(Deno.env.get("INIT_CWD") ?? ".", name);
      const checkpoint = await open(path);
      checkText(path, checkpoint, tokens, reference);
      models.push({ name, path, checkpoint });
    }
    const gpu = await Gpu.open({ software: flags.software });
    const load = (checkpoint: Checkpoint, decode: NumericsProfile["decode"]) =>
      StageChain.load({
        gpu,
        config: checkpoint.config,
        tensors: checkpoint,
        limits: perplexityLimits(flags.window),
        profile: { version: PROFILE_VERSION, decode },
      });
    try {
      const measure = reference ? await load(reference, "codegemm") : null;
      const rows: EvaluateRow[] = [];
      for (const { name, path, checkpoint } of models) {
        const { vocabSize, codegemm } = checkpoint.config;
        const chain = await load(checkpoint, flags.int8 ? "int8" : "codegemm");
        const startedMs = performance.now();
        const options: JudgeOptions = {
          windowTokens: flags.window,
          maxTokens: flags.max,
          onProgress: (predicted, total) => {
            if (predicted % (16 * flags.window) === 0) {
              console.error(`${path}: ${predicted} of ${total} tokens`);
            }
          },
        };
        const result = measure
          ? await judge(chain, measure, tokens, vocabSize, options)
          : await perplexity(chain, tokens, options);
        chain.destroy();
        rows.push({
          model: name,
          format: codegemm ? formatName(codegemm) : "float",
          bytes: checkpoint.names().reduce((sum, name) => sum + checkpoint.info(name).bytes, 0),
          ...result,
          tokensPerSecond: result.predicted / (performance.now() - startedMs) * 1000,
        });
      }
      measure?.destroy();
      console.log(evaluateTable(rows));
    } finally {
      gpu.close();
    }
  });
}

/** Text and reference must speak the model's vocabulary. */
function checkText(
  path: string,
  { config }: Checkpoint,
  tokens: Uint16Array | Uint32Array,
  reference: Checkpoint | null,
): void {
  const outside = tokens.findIndex((token) => token >= config.vocabSize);
  if (outside >= 0) {
    throw new FleetError(
      "bad-usage",
      `Token ${outside} of the text is ${tokens[outside]}, outside the vocabulary of ` +
        `${config.vocabSize} of ${path}`,
    );
  }
  if (reference && reference.config.vocabSize !== config.vocabSize) {
    throw new FleetError(
      "bad-usage",
      `${path} has a vocabulary of ${config.vocabSize}, the reference of ` +
        `${reference.config.vocabSize}: their predictions cannot be compared`,
    );
  }
}
