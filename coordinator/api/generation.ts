/**
 * A request's sequences, from the engine's tokens to pieces of text per choice.
 *
 * @module
 */
import { FleetError } from "../../shared/errors.ts";
import type { GenerateEvent, GenerateRequest } from "../engine.ts";
import type { ApiContext } from "./context.ts";
import { merge } from "./merge.ts";
import type { SharedRequest } from "./schemas.ts";
import { type PlacedEntry, TextStream } from "./text_stream.ts";

/** A drawn token as the engine reports it. */
export type DrawnToken = Extract<GenerateEvent, { type: "token" }>;

/** What one choice grew by. */
export interface Piece {
  /** Index of the choice in the answer. */
  index: number;
  text: string;
  tokens: PlacedEntry<DrawnToken>[];
  /** Null until the choice is finished. */
  finish: "stop" | "length" | null;
}

/** Token counts in OpenAI's names. */
export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
}

/** A request under way. */
export interface Generation {
  /** The pieces of all choices as they come; ends when every choice is finished. */
  pieces: AsyncIterable<Piece>;
  /** How many choices there are. */
  choices: number;
  /** The counts so far: every prompt once, and every drawn token, stop tokens included. */
  usage(): Usage;
}

/** What is asked of every prompt alike. */
export interface GenerationOptions {
  request: SharedRequest;
  prompts: readonly Uint32Array[];
  /** At least 1; the context bounds it beside. */
  maxTokens: number;
  alternatives: number;
}

interface Counts {
  drawn: number;
}

/**
 * Admits `n` sequences for each prompt, all of them or none. A prompt's choices share its seed and
 * differ by their index, so a list of prompts draws what its members would draw alone.
 *
 * @param abort ends every sequence when aborted; aborted here when one of them fails
 * @throws FleetError of the engine's admission, or `bad-request` for a token beyond the vocabulary
 */
export function startGeneration(
  api: ApiContext,
  options: GenerationOptions,
  abort: AbortController,
): Generation {
  const { request, prompts } = options;
  const choicesPerPrompt = request.n ?? 1;
  const sampling = samplingOf(api, options);
  for (const prompt of prompts) checkPrompt(api, prompt);
  const counts: Counts = { drawn: 0 };
  const sources: AsyncIterable<Piece>[] = [];
  try {
    for (const [index, promptTokens] of prompts.entries()) {
      const seed = request.seed === undefined ? api.randomSeed() : BigInt(request.seed);
      for (let choice = 0; choice < choicesPerPrompt; choice++) {
        const asked = { ...sampling, promptTokens, seed: BigInt.asUintN(64, seed), choice };
        const at = index * choicesPerPrompt + choice;
        sources.push(startChoice(api, asked, request.stop ?? [], at, counts, abort));
      }
    }
  } catch (error) {
    abort.abort(error);
    throw error;
  }
  const promptCount = prompts.reduce((sum, prompt) => sum + prompt.length, 0);
  api.metrics.promptTokens(promptCount);
  return {
    pieces: merge(sources, (reason) => abort.abort(reason)),
    choices: sources.length,
    usage: () => ({
      prompt_tokens: promptCount,
      completion_tokens: counts.drawn,
      total_tokens: promptCount + counts.drawn,
    }),
  };
}

function samplingOf(api: ApiContext, { request, maxTokens, alternatives }: GenerationOptions) {
  const { vocabSize, eosTokens } = api.engine.model;
  const bias = new Map(
    Object.entries(request.logit_bias ?? {}).map(([id, value]) => [Number(id), value]),
  );
  for (const id of bias.keys()) {
    if (id < vocabSize) continue;
    const message = `logit_bias names token ${id}; the vocabulary has ${vocabSize}`;
    throw new FleetError("bad-request", message, { param: "logit_bias" });
  }
  // A nucleus of mass 0 holds the likeliest token alone; the engine's own range excludes 0.
  const onlyBest = request.top_p === 0;
  return {
    maxTokens,
    temperature: request.temperature ?? 1,
    topP: onlyBest ? 1 : request.top_p ?? 1,
    topK: onlyBest ? 1 : Math.max(0, request.top_k ?? 0),
    presencePenalty: request.presence_penalty ?? 0,
    frequencyPenalty: request.frequency_penalty ?? 0,
    bias,
    alternatives,
    stopTokens: eosTokens,
  } satisfies Partial<GenerateRequest>;
}

function checkPrompt({ engine }: ApiContext, prompt: Uint32Array): void {
  const { vocabSize, contextTokens } = engine.model;
  if (prompt.length === 0) throw new FleetError("bad-request", "The prompt has no tokens");
  if (prompt.length > contextTokens) {
    const message = `The prompt has ${prompt.length} tokens, the model's context ` +
      `${contextTokens}; shorten it`;
    throw new FleetError("too-large", message);
  }
  const wrong = prompt.find((token) => token >= vocabSize);
  if (wrong === undefined) return;
  const message = `The prompt holds token ${wrong}; the vocabulary has ${vocabSize}`;
  throw new FleetError("bad-request", message, { param: "prompt" });
}

/** Admits one sequence now; the pieces of its text come later. */
function startChoice(
  api: ApiContext,
  request: GenerateRequest,
  stops: readonly string[],
  index: number,
  counts: Counts,
  abort: AbortController,
): AsyncIterable<Piece> {
  const own = new AbortController();
  const signal = AbortSignal.any([abort.signal, own.signal]);
  const admittedMs = api.clock.nowMs();
  const events = api.engine.generate(request, signal);
  return choicePieces(api, events, { stops, index, counts, own, admittedMs, request });
}

interface Choice {
  stops: readonly string[];
  index: number;
  counts: Counts;
  /** Ends this sequence alone: a stop string was found. */
  own: AbortController;
  admittedMs: number;
  request: GenerateRequest;
}

async function* choicePieces(
  { clock, tokenizer, metrics }: ApiContext,
  events: AsyncIterable<GenerateEvent>,
  { stops, index, counts, own, admittedMs, request }: Choice,
): AsyncGenerator<Piece> {
  const stream = new TextStream<DrawnToken>(tokenizer.stream(), stops);
  let lastMs: number | null = null;
  for await (const event of events) {
    if (event.type === "finish") {
      const { text, entries, stopped } = stream.end();
      yield { index, text, tokens: entries, finish: stopped ? "stop" : event.reason };
      return;
    }
    const nowMs = clock.nowMs();
    if (lastMs === null) metrics.firstToken(nowMs - admittedMs);
    else metrics.nextToken(nowMs - lastMs);
    lastMs = nowMs;
    counts.drawn++;
    // A stop token is the end of the text, not a part of it; the finish follows.
    if (request.stopTokens.includes(event.token)) continue;
    const { text, entries, stopped } = stream.push(event.token, event);
    if (stopped) {
      own.abort(new FleetError("cancelled", "A stop string was found"));
      yield { index, text, tokens: entries, finish: "stop" };
      return;
    }
    if (text !== "" || entries.length > 0) yield { index, text, tokens: entries, finish: null };
  }
  throw new FleetError("cancelled", "The request was called off before its answer was complete");
}
