/**
 * `POST /v1/chat/completions`.
 *
 * @module
 */
import type { Handler } from "hono";
import { FleetError } from "../../shared/errors.ts";
import { abortWith } from "./abort.ts";
import { answerHead, type ChunkShape, collect, streamAnswer } from "./answer.ts";
import { readJson } from "./body.ts";
import type { ApiContext } from "./context.ts";
import { type Piece, startGeneration } from "./generation.ts";
import { chatLogprobs } from "./logprobs.ts";
import { requireModel } from "./models.ts";
import { type ChatRequest, chatRequest, parseBody } from "./schemas.ts";

/** The route's handler. */
export function chatCompletions(api: ApiContext): Handler {
  return async (context) => {
    const request = parseBody(chatRequest, await readJson(context.req.raw));
    requireModel(api, request.model);
    const prompt = renderPrompt(api, request);
    const abort = abortWith(context.req.raw.signal);
    const generation = startGeneration(api, {
      request,
      prompts: [prompt],
      maxTokens: request.max_completion_tokens ?? request.max_tokens ??
        api.engine.model.contextTokens,
      alternatives: request.top_logprobs ?? 0,
    }, abort);
    const head = answerHead(api, "chatcmpl");
    const logprobs = (tokens: Piece["tokens"]) =>
      request.logprobs === true ? chatLogprobs(api.tokenizer, tokens) : null;
    if (request.stream) {
      const shape = chunkShape(head, generation.choices, logprobs);
      return streamAnswer(api, request, generation, shape, abort);
    }
    const choices = await collect(generation);
    return context.json({
      ...head,
      object: "chat.completion",
      choices: choices.map(({ index, text, tokens, finish }) => ({
        index,
        message: { role: "assistant", content: text, refusal: null },
        logprobs: logprobs(tokens),
        finish_reason: finish,
      })),
      usage: generation.usage(),
    });
  };
}

/** The messages through the model's own template, as tokens. The template writes the BOS itself. */
function renderPrompt({ chatTemplate, tokenizer, engine }: ApiContext, request: ChatRequest) {
  if (chatTemplate === null) {
    const message = `The model ${engine.model.id} has no chat template; use POST /v1/completions`;
    throw new FleetError("bad-request", message, { param: "messages" });
  }
  const messages = request.messages.map(({ role, content, name }) => ({
    // OpenAI's newer word for the same thing; templates know the older one.
    role: role === "developer" ? "system" : role,
    content,
    ...(name === undefined ? {} : { name }),
  }));
  let text: string;
  try {
    text = chatTemplate.render({ messages, add_generation_prompt: true });
  } catch (cause) {
    if (!(cause instanceof FleetError)) throw cause;
    throw new FleetError(cause.code, cause.message, { cause, param: "messages" });
  }
  return tokenizer.encode(text, { maxTokens: engine.model.contextTokens });
}

function chunkShape(
  head: ReturnType<typeof answerHead>,
  choices: number,
  logprobs: (tokens: Piece["tokens"]) => object | null,
): ChunkShape {
  const choice = (
    index: number,
    delta: object,
    finish: string | null,
    tokens?: Piece["tokens"],
  ) => ({ index, delta, logprobs: tokens ? logprobs(tokens) : null, finish_reason: finish });
  return {
    head: { ...head, object: "chat.completion.chunk" },
    opening: Array.from(
      { length: choices },
      (_, index) => choice(index, { role: "assistant", content: "", refusal: null }, null),
    ),
    choices({ index, text, tokens, finish }) {
      const grown = text !== "" || tokens.length > 0;
      return [
        ...(grown ? [choice(index, { content: text }, null, tokens)] : []),
        ...(finish === null ? [] : [choice(index, {}, finish)]),
      ];
    },
  };
}
