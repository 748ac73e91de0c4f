/**
 * The HTTP face of a fleet: OpenAI's dialect under `/v1`, and what watches the fleet beside it.
 *
 * @module
 */
import { type Handler, Hono } from "hono";
import { routePath } from "hono/route";
import { HTTPException } from "hono/http-exception";
import { monitorPage } from "../monitor/mod.ts";
import { requireKey } from "./auth.ts";
import { chatCompletions } from "./chat.ts";
import { completions } from "./completions.ts";
import type { ApiContext } from "./context.ts";
import { failureResponse, logText, toApiFailure } from "./errors.ts";
import { fleetEvents, fleetSnapshot, metricsPage } from "./fleet.ts";
import { healthz, readyz } from "./health.ts";
import { getModel, listModels } from "./models.ts";

export type { ApiContext } from "./context.ts";

/** A route: who may call it with what. */
interface Route {
  method: "GET" | "POST";
  path: string;
  /** Needs an API key where keys are set. Only what shows nothing of the fleet does not. */
  key: boolean;
  handler: Handler;
}

/**
 * The API as a Hono app. Serve it with `Deno.serve({ hostname, port }, app.fetch)` and
 * `--unstable-no-legacy-abort`, else a request's signal also fires after its success.
 *
 * With API keys, all of `/v1`, `/fleet`, `/events` and `/metrics` ask for one; `/healthz`,
 * `/readyz` and the empty monitor page (which then asks for the key) are open.
 */
export function createApi(api: ApiContext): Hono {
  const app = new Hono();
  const routes: Route[] = [
    { method: "POST", path: "/v1/chat/completions", key: true, handler: chatCompletions(api) },
    { method: "POST", path: "/v1/completions", key: true, handler: completions(api) },
    { method: "GET", path: "/v1/models", key: true, handler: listModels(api) },
    { method: "GET", path: "/v1/models/:id{.+}", key: true, handler: getModel(api) },
    { method: "GET", path: "/fleet", key: true, handler: fleetSnapshot(api) },
    { method: "GET", path: "/events", key: true, handler: fleetEvents(api) },
    { method: "GET", path: "/metrics", key: true, handler: metricsPage(api) },
    { method: "GET", path: "/healthz", key: false, handler: healthz() },
    { method: "GET", path: "/readyz", key: false, handler: readyz(api) },
    ...monitorPage().map((page) => ({ ...page, method: "GET" as const, key: false })),
  ];
  const checkKey = requireKey(api.apiKeys);
  app.use(async (context, next) => {
    const startMs = api.clock.nowMs();
    await next();
    const seconds = (api.clock.nowMs() - startMs) / 1000;
    const known = routes.find((route) => route.path === routePath(context, -1));
    api.metrics.request(known?.path ?? "other", context.res.status, seconds);
    context.res.headers.set("x-content-type-options", "nosniff");
  });
  for (const { method, path, key, handler } of routes) {
    if (key) app.on(method, path, checkKey);
    app.on(method, path, handler);
    app.all(path, ({ req }) => {
      const message = `${req.path} takes ${method}, not ${req.method}`;
      const failure = toApiFailure(new HTTPException(405, { message }));
      failure.headers.allow = method;
      return failureResponse(failure);
    });
  }
  app.notFound(({ req }) => {
    const message = `There is no ${req.path} here; the API is under /v1, the monitor at /`;
    return failureResponse(toApiFailure(new HTTPException(404, { message })));
  });
  app.onError((error, { req }) => {
    const failure = toApiFailure(error);
    if (failure.ours) api.log("error", `${req.method} ${req.path}: ${logText(error)}`);
    return failureResponse(failure);
  });
  return app;
}
