/**
 * What happened lately, for `/fleet` and the page, and how fast tokens come.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";
import type { FleetEvent } from "./snapshot.ts";

/**
 * What an event is about. Each topic has its own room and its own pace, so that a flood of one kind
 * (a bus that loses frames, somebody who sends rubbish) neither pushes out the others nor fills the log.
 */
export type Topic = "bus" | "workers" | "plans" | "steps" | Rejection;

/** What nobody should send. */
export type Rejection = "malformed-message" | "malformed-frame" | "wrong-sender" | "other-version";

/** Events remembered of each topic. */
const EVENTS_PER_TOPIC = 40;
/** Events of a topic within a span; those beyond are only counted, and the count told at its end. */
const EVENTS_PER_SPAN = 10;
const SPAN_MS = 10_000;
/** A plan of 128 stages is explained in more words than anybody reads. */
const MOST_CHARACTERS = 4_000;

/** The span of {@linkcode TokenRate}. */
const RATE_SPAN_MS = 5_000;
const RATE_SLOT_MS = 100;

interface Room {
  /** Newest first. */
  events: (FleetEvent & { order: number })[];
  spanEndsMs: number;
  /** Events of this span, told or not. */
  count: number;
}

/** The last events of each topic; what is remembered is also handed to `print` as it comes. */
export class FleetLog {
  readonly #rooms = new Map<Topic, Room>();
  readonly #clock: Clock;
  readonly #print: (event: FleetEvent) => void;
  #order = 0;

  constructor(clock: Clock, print: (event: FleetEvent) => void) {
    this.#clock = clock;
    this.#print = print;
  }

  add(topic: Topic, level: FleetEvent["level"], text: string): void {
    let room = this.#rooms.get(topic);
    if (!room) this.#rooms.set(topic, room = { events: [], spanEndsMs: 0, count: 0 });
    this.#turn(topic, room);
    room.count++;
    if (room.count <= EVENTS_PER_SPAN) this.#tell(room, level, text);
  }

  /** To be called now and then: tells how many events a span that is over had beyond those told. */
  tick(): void {
    for (const [topic, room] of this.#rooms) this.#turn(topic, room);
  }

  /** Newest first. */
  get events(): FleetEvent[] {
    return [...this.#rooms.values()].flatMap(({ events }) => events)
      .sort((a, b) => b.order - a.order)
      .map(({ atUnixMs, level, text }) => ({ atUnixMs, level, text }));
  }

  /** Begins a new span when the old one is over. */
  #turn(topic: Topic, room: Room): void {
    const nowMs = this.#clock.nowMs();
    if (nowMs < room.spanEndsMs) return;
    const untold = room.count - EVENTS_PER_SPAN;
    room.spanEndsMs = nowMs + SPAN_MS;
    room.count = 0;
    if (untold <= 0) return;
    this.#tell(room, "warning", `${untold} more events about ${topic} in ${SPAN_MS / 1000} s`);
  }

  #tell(room: Room, level: FleetEvent["level"], text: string): void {
    const event = { atUnixMs: this.#clock.unixMs(), level, text: oneLine(text) };
    room.events.unshift({ ...event, order: this.#order++ });
    if (room.events.length > EVENTS_PER_TOPIC) room.events.pop();
    this.#print(event);
  }
}

/** Some of the words come from workers: they shall not write lines, or control a terminal. */
function oneLine(text: string): string {
  return text.slice(0, MOST_CHARACTERS).replaceAll(/\p{Cc}+/gu, " ");
}

/** What was not taken, by reason: the coordinator's own, as workers count theirs in beats. */
export class Rejections {
  readonly counts: Record<string, number> = {};
  readonly #log: FleetLog;

  constructor(log: FleetLog) {
    this.#log = log;
  }

  /** Counts one that the ordinary course of things brings: late, doubled, of an earlier plan. */
  count(reason: string): void {
    this.counts[reason] = (this.counts[reason] ?? 0) + 1;
  }

  /** Counts one that nobody should have sent, and says so in words. */
  warn(reason: Rejection, text: string): void {
    this.count(reason);
    this.#log.add(reason, "warning", text.slice(0, 300));
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
