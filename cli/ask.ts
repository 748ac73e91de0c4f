/**
 * `deno task ask "prompt"`: asks a fleet and prints the answer as it comes.
 *
 * @module
 */
import { z } from "zod";
import { eventPayloads } from "../coordinator/monitor/event_stream.js";
import { type Clock, systemClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { API_FLAGS, type ApiAddress, apiAddress, callApi, parseApiError } from "./api_client.ts";

const COMMAND = {
  command: "ask",
  summary: "Asks a fleet and prints the answer as it comes; its speed goes to standard error.",
  positionals: { name: "prompt", help: "the question; standard input without it", optional: true },
  flags: {
    ...API_FLAGS,
    "system": { type: "string", help: "the system message" },
    "max-tokens": { type: "integer", min: 1, help: "tokens of the answer at most" },
    "temperature": {
      type: "number",
      min: 0,
      max: 2,
      help: "0 is greedy (the server's default: 1)",
    },
    "seed": { type: "integer", help: "the same seed gives the same answer" },
    "raw": { type: "boolean", help: "continue the prompt as it is, without the chat template" },
  },
} as const;

/** What is asked. */
export interface Question {
  prompt: string;
  system?: string;
  maxTokens?: number;
  temperature?: number;
  seed?: number;
  raw: boolean;
}

/** Where an answer goes. */
export interface Answers {
  /** The answer's text, piece by piece. */
  write(text: string): Promise<void> | void;
  /** Lines about the answer. */
  note(text: string): void;
}

/** Of a continuation without `--max-tokens`; the API's own default is 16. */
const RAW_MAX_TOKENS = 256;

const modelList = z.object({
  data: z.array(z.object({ id: z.string(), chat: z.boolean().optional() })).min(1),
});

const chunk = z.object({
  choices: z.array(z.object({
    text: z.string().optional(),
    delta: z.object({ content: z.string().nullish() }).optional(),
    finish_reason: z.string().nullish(),
  })),
  usage: z.object({ completion_tokens: z.number() }).nullish(),
});

/**
 * Asks and prints. A model without a chat template continues the prompt instead, and a note says so.
 *
 * @throws FleetError with the server's words, also for an answer that broke off
 */
export async function ask(
  api: ApiAddress,
  question: Question,
  { write, note }: Answers,
  clock: Clock = systemClock,
): Promise<void> {
  const models = modelList.parse(await (await callApi(api, "/v1/models")).json());
  const [{ id, chat = true }] = models.data;
  if (!question.raw && !chat) {
    note(`${id} has no chat template; continuing the prompt as it is (--raw says so beforehand)`);
  }
  const raw = question.raw || !chat;
  if (raw && question.system !== undefined) {
    throw new FleetError("bad-usage", "--system needs a chat template; put it into the prompt");
  }
  const startMs = clock.nowMs();
  let firstMs: number | null = null, finish: string | null = null, tokens = 0;
  const response = await callApi(
    api,
    raw ? "/v1/completions" : "/v1/chat/completions",
    requestBody(id, question, raw),
  );
  for await (const payload of eventPayloads(response.body!)) {
    if (payload === "[DONE]") break;
    const failure = parseApiError(payload);
    if (failure && firstMs !== null) await write("\n");
    if (failure) throw failure;
    const { choices: [choice], usage } = chunk.parse(JSON.parse(payload));
    tokens = usage?.completion_tokens ?? tokens;
    finish = choice?.finish_reason ?? finish;
    const text = choice?.text ?? choice?.delta?.content ?? "";
    if (text === "") continue;
    firstMs ??= clock.nowMs();
    await write(text);
  }
  await write("\n");
  if (finish === null) {
    throw new FleetError("unavailable", "The answer broke off; the coordinator went away");
  }
  note(speedLine(tokens, finish, startMs, firstMs ?? clock.nowMs(), clock.nowMs()));
}

function requestBody(model: string, question: Question, raw: boolean): object {
  const { prompt, system, maxTokens, temperature, seed } = question;
  const messages = [
    ...(system === undefined ? [] : [{ role: "system", content: system }]),
    { role: "user", content: prompt },
  ];
  return {
    model,
    ...(raw ? { prompt } : { messages }),
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: maxTokens ?? (raw ? RAW_MAX_TOKENS : undefined),
    temperature,
    seed,
  };
}

/** The rate leaves out the time to the first token: that is the prompt's. */
function speedLine(
  tokens: number,
  finish: string,
  startMs: number,
  firstMs: number,
  endMs: number,
): string {
  const rate = tokens > 1 && endMs > firstMs
    ? `, ${((tokens - 1) / (endMs - firstMs) * 1000).toFixed(1)} tokens/s`
    : "";
  const first = `first token after ${Math.round(firstMs - startMs)} ms`;
  const why = finish === "length" ? " (cut at its length)" : "";
  return `${tokens} tokens${why}, ${first}${rate}`;
}

async function main(): Promise<void> {
  const { values, positionals } = parseFlags(COMMAND);
  const prompt = positionals.length > 0
    ? positionals.join(" ")
    : await new Response(Deno.stdin.readable).text();
  if (prompt.trim() === "") throw new FleetError("bad-usage", 'ask what? deno task ask "prompt"');
  const encoder = new TextEncoder();
  // What a model writes must not steer the terminal; a file gets it as it is.
  const isTerminal = Deno.stdout.isTerminal();
  const shown = (text: string) => isTerminal ? text.replace(/(?![\n\t])\p{Cc}/gu, "") : text;
  const writer = Deno.stdout.writable.getWriter();
  await ask(await apiAddress(values), {
    prompt,
    system: values.system,
    maxTokens: values["max-tokens"],
    temperature: values.temperature,
    seed: values.seed,
    raw: values.raw,
  }, {
    write: (text) => writer.write(encoder.encode(shown(text))),
    note: (text) => console.error(text),
  });
}

if (import.meta.main) await runCommand(main);
