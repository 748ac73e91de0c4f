/**
 * `GET /v1/models` and `GET /v1/models/:id`.
 *
 * @module
 */
import type { Handler } from "hono";
import { FleetError } from "../../shared/errors.ts";
import type { ApiContext } from "./context.ts";

/** A model in OpenAI's shape, with two extensions that clients need to know what they may ask. */
function describe({ engine, chatTemplate }: ApiContext) {
  const { id, createdUnix, contextTokens } = engine.model;
  return {
    id,
    object: "model",
    created: createdUnix,
    owned_by: "codegemm-fleet",
    /** Prompt and answer together have at most this many tokens. */
    context_tokens: contextTokens,
    /** Whether the model has a chat template; without one it serves completions only. */
    chat: chatTemplate !== null,
  };
}

/** Lists the one model of the fleet. */
export function listModels(api: ApiContext): Handler {
  return (context) => context.json({ object: "list", data: [describe(api)] });
}

/** Describes the model of that name; the name may hold slashes. */
export function getModel(api: ApiContext): Handler {
  return (context) => {
    requireModel(api, context.req.param("id") ?? "");
    return context.json(describe(api));
  };
}

/** @throws FleetError `not-found` for any model but ours */
export function requireModel({ engine }: ApiContext, model: string): void {
  if (model === engine.model.id) return;
  const message = `The model ${JSON.stringify(model)} is not here; this fleet serves ` +
    JSON.stringify(engine.model.id);
  throw new FleetError("not-found", message, { param: "model" });
}
