/**
 * Server-sent events from an async iterable.
 *
 * @module
 */
import { type Clock, sleep } from "../../shared/clock.ts";

/** A comment goes out when nothing else did for this long, so that no proxy calls the stream idle. */
const KEEP_ALIVE_MS = 15_000;

/**
 * Answers with `events`, each the payload of one `data:` line (without line breaks).
 *
 * The reader sets the pace: an event is taken when the connection has room for it. When the reader
 * goes away, `abort` is aborted, which must end the iterable.
 */
export function eventStream(
  events: AsyncIterable<string>,
  clock: Clock,
  abort: AbortController,
): Response {
  const encoder = new TextEncoder();
  const iterator = events[Symbol.asyncIterator]();
  let next: Promise<IteratorResult<string>> | null = null;
  const body = new ReadableStream<Uint8Array>({
    async pull(controller) {
      next ??= iterator.next();
      const result = await within(next, clock, KEEP_ALIVE_MS);
      if (result === null) return controller.enqueue(encoder.encode(": still here\n\n"));
      next = null;
      if (result.done) return controller.close();
      controller.enqueue(encoder.encode(`data: ${result.value}\n\n`));
    },
    async cancel(reason) {
      abort.abort(reason);
      await iterator.return?.();
    },
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
