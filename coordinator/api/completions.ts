/**
 * `POST /v1/completions`.
 *
 * @module
 */
import type { Handler } from "hono";
import { abortWith } from "./abort.ts";
import { answerHead, collect, streamAnswer } from "./answer.ts";
import { readJson } from "./body.ts";
import type { ApiContext } from "./context.ts";
import { type Piece, startGeneration } from "./generation.ts";
import { completionLogprobs } from "./logprobs.ts";
import { requireModel } from "./models.ts";
import { completionRequest, parseBody } from "./schemas.ts";

/** OpenAI's own default of `max_tokens` on this route. */
const DEFAULT_MAX_TOKENS = 16;

/** The route's handler. Text prompts get the tokenizer's BOS, prompts of token ids are left alone. */
export function completions(api: ApiContext): Handler {
  return async (context) => {
    const request = parseBody(completionRequest, await readJson(context.req.raw));
    requireModel(api, request.model);
    const abort = abortWith(context.req.raw.signal);
    const generation = startGeneration(api, {
      request,
      prompts: request.prompt.map((prompt) =>
        typeof prompt === "string"
          ? api.tokenizer.encode(prompt, {
            addSpecialTokens: true,
            maxTokens: api.engine.model.contextTokens,
          })
          : Uint32Array.from(prompt)
      ),
      maxTokens: request.max_tokens ?? DEFAULT_MAX_TOKENS,
      alternatives: request.logprobs ?? 0,
    }, abort);
    const head = { ...answerHead(api, "cmpl"), object: "text_completion" };
    const choice = ({ index, text, tokens, finish }: Piece) => ({
      index,
      text,
      logprobs: request.logprobs === undefined ? null : completionLogprobs(api.tokenizer, tokens),
      finish_reason: finish,
    });
    if (request.stream) {
      const shape = { head, opening: [], choices: (piece: Piece) => [choice(piece)] };
      return streamAnswer(api, request, generation, shape, abort);
    }
    const choices = await collect(generation);
    return context.json({ ...head, choices: choices.map(choice), usage: generation.usage() });
  };
}
