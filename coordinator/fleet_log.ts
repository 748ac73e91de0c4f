/**
 * What happened lately, for `/fleet` and the page, and how fast tokens come.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";
import type { FleetEvent } from "./snapshot.ts";

/** Events remembered. */
const EVENTS = 100;
/** The span of {@linkcode TokenRate}. */
const RATE_SPAN_MS = 5_000;
const RATE_SLOT_MS = 100;

/** The last {@linkcode EVENTS} events; each is also handed to `print` as it comes. */
export class FleetLog {
  #events: FleetEvent[] = [];
  readonly #clock: Clock;
  readonly #print: (event: FleetEvent) => void;

  constructor(clock: Clock, print: (event: FleetEvent) => void) {
    this.#clock = clock;
    this.#print = print;
  }

  add(level: FleetEvent["level"], text: string): void {
    const event = { atUnixMs: this.#clock.unixMs(), level, text };
    this.#events.unshift(event);
    if (this.#events.length > EVENTS) this.#events.pop();
    this.#print(event);
  }

  /** Newest first. */
  get events(): FleetEvent[] {
    return [...this.#events];
  }
}

/** Tokens per second over the last five seconds. */
export class TokenRate {
  #slots: { slot: number; tokens: number }[] = [];
  total = 0;

  add(tokens: number, nowMs: number): void {
    this.total += tokens;
    const slot = Math.floor(nowMs / RATE_SLOT_MS);
    const last = this.#slots.at(-1);
    if (last?.slot === slot) last.tokens += tokens;
    else this.#slots.push({ slot, tokens });
    this.#forget(nowMs);
  }

  perSecond(nowMs: number): number {
    this.#forget(nowMs);
    return this.#slots.reduce((sum, { tokens }) => sum + tokens, 0) / (RATE_SPAN_MS / 1000);
  }

  #forget(nowMs: number): void {
    const oldest = Math.floor((nowMs - RATE_SPAN_MS) / RATE_SLOT_MS);
    while (this.#slots.length > 0 && this.#slots[0].slot <= oldest) this.#slots.shift();
  }
}
