/**
 * `deno task monitor`: the fleet in a terminal, live.
 *
 * @module
 */
import { eventPayloads } from "../coordinator/monitor/event_stream.js";
import type { FleetSnapshot } from "../coordinator/snapshot.ts";
import { sleep, systemClock } from "../shared/clock.ts";
import { toFleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { API_FLAGS, type ApiAddress, apiAddress, callApi } from "./api_client.ts";
import { monitorView } from "./monitor_view.ts";

const COMMAND = {
  command: "monitor",
  summary: "Shows the fleet in a terminal, live; once where the output is no terminal.",
  flags: {
    ...API_FLAGS,
    once: { type: "boolean", help: "print once and end" },
  },
} as const;

const RETRY_MS = 1_000;
const PLAIN = { columns: 240, rows: 400, color: false };

/** The alternate screen with its cursor hidden, and back. */
const ENTER = "\x1b[?1049h\x1b[?25l", LEAVE = "\x1b[?25h\x1b[?1049l";
const HOME = "\x1b[H", CLEAR_LINE = "\x1b[K", CLEAR_BELOW = "\x1b[J";

/** Snapshots as they come, until the link breaks or `signal` aborts. */
export async function* followFleet(
  api: ApiAddress,
  signal: AbortSignal,
): AsyncGenerator<FleetSnapshot> {
  const response = await callApi(api, "/events", undefined, signal);
  for await (const payload of eventPayloads(response.body!)) yield JSON.parse(payload);
}

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  const api = await apiAddress(values);
  if (values.once || !Deno.stdout.isTerminal()) {
    console.log(monitorView(await (await callApi(api, "/fleet")).json(), PLAIN));
    return;
  }
  const stop = new AbortController();
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    Deno.addSignalListener(signal, () => stop.abort());
  }
  draw(ENTER);
  try {
    await watch(api, stop.signal);
  } finally {
    draw(LEAVE);
  }
}

/** Draws until stopped; a link that breaks is mended. What cannot get better is thrown. */
async function watch(api: ApiAddress, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    let why = "The coordinator closed the link";
    try {
      for await (const snapshot of followFleet(api, signal)) {
        const { columns, rows } = Deno.consoleSize();
        drawScreen(monitorView(snapshot, { columns, rows, color: !Deno.noColor }));
      }
    } catch (error) {
      if (signal.aborted) return;
      const failure = toFleetError(error);
      if (failure.code === "unauthorized" || failure.code === "not-found") throw failure;
      why = failure.message;
    }
    if (signal.aborted) return;
    drawScreen(`${why}\nTrying again; Ctrl-C ends`);
    await sleep(systemClock, RETRY_MS, signal).catch(() => {});
  }
}

function drawScreen(text: string): void {
  draw(HOME + text.split("\n").join(`${CLEAR_LINE}\n`) + CLEAR_LINE + CLEAR_BELOW);
}

function draw(text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at < bytes.length;) at += Deno.stdout.writeSync(bytes.subarray(at));
}

if (import.meta.main) await runCommand(main);
