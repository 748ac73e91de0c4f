/**
 * Server-sent events from an async iterable.
 *
 * @module
 */
import { type Clock, sleep, type Timer } from "../../shared/clock.ts";
import { FleetError } from "../../shared/errors.ts";

/** A comment goes out when nothing else did for this long, so that no proxy calls the stream idle. */
const KEEP_ALIVE_MS = 15_000;
/**
 * A reader that takes nothing for this long while there is something to take is gone, or might as
 * well be: what waits for it would be kept for ever.
 */
const STALLED_AFTER_MS = 60_000;

/**
 * Answers with `events`, each the payload of one `data:` line (without line breaks).
 *
 * The reader sets the pace: an event is taken when the connection has room for it. When the reader
 * goes away or stops reading, `abort` is aborted, which must end the iterable.
 */
export function eventStream(
  events: AsyncIterable<string>,
  clock: Clock,
  abort: AbortController,
): Response {
  const encoder = new TextEncoder();
  const iterator = events[Symbol.asyncIterator]();
  let next: Promise<IteratorResult<string>> | null = null;
  let stalled: Timer | null = null;
  const leave = async (reason: unknown) => {
    stalled?.cancel();
    abort.abort(reason);
    await iterator.return?.();
  };
  const body = new ReadableStream<Uint8Array>({
    async pull(controller) {
      stalled?.cancel();
      next ??= iterator.next();
      const result = await within(next, clock, KEEP_ALIVE_MS);
      if (result?.done) return controller.close();
      if (result !== null) next = null;
      const text = result === null ? ": still here\n\n" : `data: ${result.value}\n\n`;
      controller.enqueue(encoder.encode(text));
      stalled = clock.after(STALLED_AFTER_MS, () => {
        const error = new FleetError("cancelled", "The client stopped reading");
        controller.error(error);
        leave(error).catch(() => {});
      });
    },
    cancel: leave,
  }, { highWaterMark: 0 });
  return new Response(body, {
    headers: {
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-cache, no-transform",
      // nginx buffers streams unless told.
      "x-accel-buffering": "no",
    },
  });
}

/** What `promise` resolves to, or null when that takes longer than `limitMs`. */
async function within<T>(promise: Promise<T>, clock: Clock, limitMs: number): Promise<T | null> {
  const done = new AbortController();
  const late = sleep(clock, limitMs, done.signal).then(() => null, () => null);
  try {
    return await Promise.race([promise, late]);
  } finally {
    done.abort();
  }
}
