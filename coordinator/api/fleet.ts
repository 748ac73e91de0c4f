/**
 * `GET /fleet`, `GET /events` and `GET /metrics`: the fleet watched once, live, and by Prometheus.
 *
 * @module
 */
import type { Handler } from "hono";
import { abortWith } from "./abort.ts";
import type { ApiContext } from "./context.ts";
import { SnapshotFeed } from "./snapshot_feed.ts";
import { eventStream } from "./sse.ts";

/** The fleet at this moment. */
export function fleetSnapshot({ engine }: ApiContext): Handler {
  return (context) => {
    context.header("cache-control", "no-store");
    return context.json(engine.snapshot());
  };
}

/** Snapshots as they change, as server-sent events. */
export function fleetEvents({ engine, clock }: ApiContext): Handler {
  const feed = new SnapshotFeed(engine, clock);
  return (context) => {
    const abort = abortWith(context.req.raw.signal);
    return eventStream(feed.follow(abort.signal), clock, abort);
  };
}

/** The metrics page. */
export function metricsPage({ engine, metrics }: ApiContext): Handler {
  return async (context) => {
    const text = await metrics.page(engine.snapshot());
    return context.body(text, 200, { "content-type": metrics.contentType });
  };
}
