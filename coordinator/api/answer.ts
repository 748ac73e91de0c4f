/**
 * What the two completion routes share: one answer from all its pieces, or a stream of chunks.
 *
 * @module
 */
import type { ApiContext } from "./context.ts";
import { logText, toApiFailure } from "./errors.ts";
import type { DrawnToken, Generation, Piece, Usage } from "./generation.ts";
import type { SharedRequest } from "./schemas.ts";
import { eventStream } from "./sse.ts";
import type { PlacedEntry } from "./text_stream.ts";

/** A choice when it is finished. */
export interface FinishedChoice {
  index: number;
  text: string;
  tokens: PlacedEntry<DrawnToken>[];
  finish: "stop" | "length";
}

/** What stands at the head of an answer and of each of its chunks. */
export interface AnswerHead {
  id: string;
  created: number;
  model: string;
}

/** The head of a new answer whose id begins with `prefix`. */
export function answerHead(api: ApiContext, prefix: "chatcmpl" | "cmpl"): AnswerHead {
  return {
    id: `${prefix}-${api.randomSeed().toString(16).padStart(16, "0")}`,
    created: Math.floor(api.clock.unixMs() / 1000),
    model: api.engine.model.id,
  };
}

/** Waits for all choices. */
export async function collect(generation: Generation): Promise<FinishedChoice[]> {
  const choices = Array.from(
    { length: generation.choices },
    (_, index): FinishedChoice => ({ index, text: "", tokens: [], finish: "stop" }),
  );
  for await (const piece of generation.pieces) {
    const choice = choices[piece.index];
    choice.text += piece.text;
    for (const token of piece.tokens) choice.tokens.push(token);
    if (piece.finish !== null) choice.finish = piece.finish;
  }
  return choices;
}

/** How a route writes its chunks. */
export interface ChunkShape {
  head: AnswerHead & { object: string };
  /** Choices of chunks to send before the first piece. */
  opening: object[];
  /** The choices of the chunks that a piece becomes. */
  choices(piece: Piece): object[];
}

/**
 * Answers with chunks as they come. A failure in mid-stream is a last data event in OpenAI's error
 * shape, and no `[DONE]` follows: a client must not take a part for the whole.
 */
export function streamAnswer(
  api: ApiContext,
  request: SharedRequest,
  generation: Generation,
  shape: ChunkShape,
  abort: AbortController,
): Response {
  const withUsage = request.stream_options?.include_usage === true;
  const chunk = (choices: object[], usage: Usage | null) =>
    JSON.stringify({ ...shape.head, choices, ...(withUsage ? { usage } : {}) });
  async function* events() {
    try {
      for (const choice of shape.opening) yield chunk([choice], null);
      for await (const piece of generation.pieces) {
        for (const choice of shape.choices(piece)) yield chunk([choice], null);
      }
      if (withUsage) yield chunk([], generation.usage());
      yield "[DONE]";
    } catch (error) {
      const failure = toApiFailure(error);
      api.metrics.streamFailed(failure.body.error.code ?? "other");
      if (failure.ours) api.log("error", `A stream failed: ${logText(error)}`);
      yield JSON.stringify(failure.body);
    }
  }
  return eventStream(events(), api.clock, abort);
}
