/**
 * The sequences that somebody waits for: the scheduler's events on their way to their readers, and how
 * many there were.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";
import type { GenerateRequest } from "./engine.ts";
import { EventStream } from "./event_stream.ts";
import { TokenRate } from "./fleet_log.ts";
import type { Scheduler, SchedulerEvent } from "./scheduler.ts";

/** The open streams of a fleet; they outlive plans and pipelines. */
export class Streams {
  readonly rate = new TokenRate();
  readonly #clock: Clock;
  readonly #open = new Map<string, EventStream>();
  #admitted = 0;

  constructor(clock: Clock) {
    this.#clock = clock;
  }

  /** Sequences admitted since start. */
  get admitted(): number {
    return this.#admitted;
  }

  /**
   * Submits a sequence and opens its stream, which ends when `signal` aborts.
   *
   * @param onCancelled called after a reader that left has taken its sequence out of the scheduler
   * @throws FleetError of the scheduler's admission
   */
  open(
    scheduler: Scheduler,
    request: GenerateRequest,
    signal: AbortSignal,
    onCancelled: () => void,
  ): EventStream {
    const id = `s${this.#admitted + 1}`;
    scheduler.submit({ ...request, id });
    this.#admitted++;
    const stream = new EventStream(() => {
      this.#open.delete(id);
      scheduler.cancel(id);
      onCancelled();
    });
    this.#open.set(id, stream);
    if (signal.aborted) stream.close();
    else signal.addEventListener("abort", () => stream.close(), { once: true });
    return stream;
  }

  /** Hands events to their readers. */
  deliver(events: readonly SchedulerEvent[]): void {
    let tokens = 0;
    for (const { id, ...event } of events) {
      const stream = this.#open.get(id);
      if (event.type === "token") tokens++;
      else this.#open.delete(id);
      if (event.type === "error") stream?.fail(event.error);
      else stream?.push(event);
    }
    if (tokens > 0) this.rate.add(tokens, this.#clock.nowMs());
  }
}
