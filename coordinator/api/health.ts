/**
 * `GET /healthz` and `GET /readyz`, for load balancers.
 *
 * @module
 */
import type { Handler } from "hono";
import type { ApiContext } from "./context.ts";

/** The process answers; nothing is said about the fleet. */
export function healthz(): Handler {
  return (context) => context.json({ status: "ok" });
}

/** Whether tokens come out, and how we know; 503 when not. */
export function readyz({ engine }: ApiContext): Handler {
  return async (context) => {
    const { ready, reason } = await engine.readiness();
    return context.json({ ready, reason }, ready ? 200 : 503);
  };
}
