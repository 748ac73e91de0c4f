/**
 * The monitor page: static files, served under a policy that lets nothing else in.
 *
 * @module
 */
import type { Handler } from "hono";
import cardsJs from "./cards.js" with { type: "text" };
import eventStreamJs from "./event_stream.js" with { type: "text" };
import formatJs from "./format.js" with { type: "text" };
import pageCss from "./page.css" with { type: "text" };
import pageHtml from "./page.html" with { type: "text" };
import pageJs from "./page.js" with { type: "text" };
import pipelineJs from "./pipeline.js" with { type: "text" };

/** Nothing from elsewhere, nothing inline, in nobody's frame. */
const POLICY = [
  "default-src 'none'",
  "script-src 'self'",
  "style-src 'self'",
  "connect-src 'self'",
  "img-src 'self' data:",
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
].join("; ");

const SCRIPT = "text/javascript; charset=utf-8";

const FILES = [
  { path: "/", type: "text/html; charset=utf-8", text: pageHtml },
  { path: "/monitor/page.css", type: "text/css; charset=utf-8", text: pageCss },
  { path: "/monitor/page.js", type: SCRIPT, text: pageJs },
  { path: "/monitor/cards.js", type: SCRIPT, text: cardsJs },
  { path: "/monitor/pipeline.js", type: SCRIPT, text: pipelineJs },
  { path: "/monitor/format.js", type: SCRIPT, text: formatJs },
  { path: "/monitor/event_stream.js", type: SCRIPT, text: eventStreamJs },
];

/** The page's routes. The files hold nothing of the fleet: its state comes from `/events`. */
export function monitorPage(): { path: string; handler: Handler }[] {
  return FILES.map(({ path, type, text }) => ({
    path,
    handler: (context) =>
      context.body(text, 200, {
        "content-type": type,
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        // The files change with the coordinator's version, never while it runs.
        "cache-control": "no-cache",
      }),
  }));
}
