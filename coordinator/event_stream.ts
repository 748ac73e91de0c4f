/**
 * A sequence's events on their way from the fleet to whoever reads them.
 *
 * @module
 */
import { invariant } from "../shared/errors.ts";
import type { GenerateEvent } from "./engine.ts";

/**
 * A queue with one reader. Bounded by nature: a sequence makes at most `maxTokens` events and one
 * finish, and none after it.
 */
export class EventStream implements AsyncIterableIterator<GenerateEvent> {
  #events: GenerateEvent[] = [];
  #error: unknown;
  #state: "open" | "finished" | "failed" | "closed" = "open";
  #waiting: (() => void) | null = null;
  readonly #onClose: () => void;

  /** @param onClose called once, when the reader stops before the end */
  constructor(onClose: () => void) {
    this.#onClose = onClose;
  }

  /** Adds an event; those after the reader has gone are let go. */
  push(event: GenerateEvent): void {
    if (this.#state !== "open") return;
    this.#events.push(event);
    if (event.type === "finish") this.#state = "finished";
    this.#wake();
  }

  /** Ends the stream with an error, behind the events already in it. */
  fail(error: unknown): void {
    if (this.#state !== "open") return;
    this.#state = "failed";
    this.#error = error;
    this.#wake();
  }

  /** Ends the stream at once; the reader sees an end without a `finish`. */
  close(): void {
    const wasOpen = this.#state === "open";
    this.#state = "closed";
    this.#events = [];
    this.#wake();
    if (wasOpen) this.#onClose();
  }

  async next(): Promise<IteratorResult<GenerateEvent>> {
    invariant(this.#waiting === null, "an event stream has one reader");
    if (this.#events.length === 0 && this.#state === "open") {
      await new Promise<void>((resolve) => this.#waiting = resolve);
    }
    const event = this.#events.shift();
    if (event) return { done: false, value: event };
    if (this.#state === "failed") {
      this.#state = "closed";
      throw this.#error;
    }
    return { done: true, value: undefined };
  }

  /** The reader leaves (a `break` in `for await`). */
  return(): Promise<IteratorResult<GenerateEvent>> {
    this.close();
    return Promise.resolve({ done: true, value: undefined });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  #wake(): void {
    const waiting = this.#waiting;
    this.#waiting = null;
    waiting?.();
  }
}
