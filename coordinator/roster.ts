/**
 * The coordinator's ear for workers: cards, beats and reports from the bus into membership, pings for
 * round trips and clocks, and who is left out for a while.
 *
 * @module
 */
import type { z } from "zod";
import type { Bus, BusMessage, Subscription } from "../shared/bus.ts";
import type { Clock } from "../shared/clock.ts";
import { toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import {
  Beat,
  ControlReply,
  type ControlRequest,
  decodeControl,
  encodeControl,
  type Subjects,
  WorkerCard,
  WorkerReport,
} from "../shared/protocol.ts";
import { ClockOffset } from "./latency.ts";
import { type Member, Membership, type MembershipEvent } from "./membership.ts";
import type { FleetEvent } from "./snapshot.ts";

/** A report that concerns an epoch. */
export type StageReport = Exclude<WorkerReport, { type: "leaving" }>;

/** What a roster is made of, and whom it tells. */
export interface RosterOptions {
  bus: Bus;
  clock: Clock;
  subjects: Subjects;
  onMembership: (event: MembershipEvent) => void;
  /** A report of an instance that is present. */
  onReport: (worker: string, report: StageReport) => void;
  /** A worker that was left out may be tried again. */
  onRestored: () => void;
  /** The bus was away and is back. */
  onReconnected: () => void;
  log: (level: FleetEvent["level"], text: string) => void;
}

const PING_EVERY_MS = 1_000;
const PING_TIMEOUT_MS = 900;
const ROLL_CALL_EVERY_MS = 1_000;
/** A worker that failed to serve is tried again after this. */
const EXCLUDED_FOR_MS = 30_000;

/** Who is there, and how far away. */
export class Roster {
  readonly #options: RosterOptions;
  readonly #membership = new Membership();
  readonly #offsets = new Map<string, ClockOffset>();
  /** Instances that failed to serve. */
  readonly #excluded = new Map<string, { untilMs: number; reason: string }>();
  #subscriptions: Subscription[] = [];
  #lastPingMs = -Infinity;
  #lastRollCallMs = -Infinity;

  constructor(options: RosterOptions) {
    this.#options = options;
  }

  /** Listens, and calls the roll. */
  start(): void {
    const { bus, subjects, log, onReconnected } = this.#options;
    this.#subscriptions = [
      bus.subscribe(subjects.hello("*"), (message) => this.#hello(message)),
      bus.subscribe(subjects.beat("*"), (message) => this.#beat(message)),
      bus.subscribe(subjects.report("*"), (message) => this.#report(message)),
      bus.onStatus((status) => {
        log(status === "connected" ? "info" : "warning", `the bus is ${status}`);
        if (status !== "connected") return;
        this.#rollCall();
        onReconnected();
      }),
    ];
    this.#rollCall();
  }

  /** Listens no more. */
  stop(): void {
    for (const subscription of this.#subscriptions) subscription.unsubscribe();
  }

  /** To be called some times a second. */
  tick(): void {
    const nowMs = this.#options.clock.nowMs();
    this.#tell(this.#membership.tick(nowMs));
    for (const [instance, { untilMs }] of this.#excluded) {
      if (nowMs < untilMs) continue;
      this.#excluded.delete(instance);
      this.#options.onRestored();
    }
    if (nowMs - this.#lastPingMs < PING_EVERY_MS) return;
    this.#lastPingMs = nowMs;
    for (const { card, state } of this.members) {
      if (state !== "lost") this.#ping(card.worker);
    }
  }

  /** Every worker known, lost ones too, by name. */
  get members(): Member[] {
    return this.#membership.members;
  }

  /** The workers that can be given a stage now. */
  get usable(): Member[] {
    return this.#membership.usable.filter(({ card }) => !this.#excluded.has(card.instance));
  }

  /** Somebody is there, but was left out. */
  get anyExcluded(): boolean {
    return this.#membership.usable.some(({ card }) => this.#excluded.has(card.instance));
  }

  /** Whether this very process is here, and not lost. */
  isPresent(worker: string, instance: string): boolean {
    return this.#membership.isPresent(worker, instance);
  }

  /** Why a member is left out for now; null when it is not. */
  exclusion(member: Member): string | null {
    return this.#excluded.get(member.card.instance)?.reason ?? null;
  }

  /** Leaves the process that now has this name out of plans for a while. */
  exclude(worker: string, reason: string): void {
    const instance = this.#membership.get(worker)?.card.instance;
    if (!instance) return;
    const untilMs = this.#options.clock.nowMs() + EXCLUDED_FOR_MS;
    this.#excluded.set(instance, { untilMs, reason });
  }

  /** The bus says that a worker's connection is gone, sooner than its beats could. */
  disconnected(worker: string): void {
    this.#tell(this.#membership.disconnected(worker, "its connection to NATS ended"));
  }

  /** Median round trip of a ping; null before the first. */
  roundTripMs(worker: string): number | null {
    return this.#offsets.get(worker)?.roundTripMs ?? null;
  }

  /** How far the worker's clock runs ahead of ours, ms. */
  clockOffsetMs(worker: string): number {
    return this.#offsets.get(worker)?.offsetMs ?? 0;
  }

  /** Asks a worker to stop serving; one that does not answer is lost anyway. */
  release(worker: string): void {
    const { card, beat } = this.#membership.get(worker) ?? {};
    if (!card || !beat?.epoch) return;
    this.#request(
      worker,
      { type: "release", instance: card.instance, epoch: beat.epoch },
      LIMITS.controlTimeoutMs,
    ).catch(() => {});
  }

  #hello(message: BusMessage): void {
    const card = this.#parse(WorkerCard, message);
    if (!card || card.worker !== speaker(message)) return;
    this.#tell(this.#membership.hello(card, this.#options.clock.nowMs()));
  }

  #beat(message: BusMessage): void {
    const beat = this.#parse(Beat, message);
    if (!beat || beat.worker !== speaker(message)) return;
    const events = this.#membership.beat(beat, this.#options.clock.nowMs());
    if (events === null) this.#rollCall();
    else this.#tell(events);
  }

  #report(message: BusMessage): void {
    const report = this.#parse(WorkerReport, message);
    const worker = speaker(message);
    if (!report || !this.isPresent(worker, report.instance)) return;
    if (report.type === "leaving") {
      this.#tell(this.#membership.leaving(worker, report.instance));
    } else {
      this.#options.onReport(worker, report);
    }
  }

  #tell(events: readonly MembershipEvent[]): void {
    for (const event of events) {
      if (event.type === "lost") this.#offsets.delete(event.worker);
      this.#options.onMembership(event);
    }
  }

  #rollCall(): void {
    const { bus, clock, subjects } = this.#options;
    if (clock.nowMs() - this.#lastRollCallMs < ROLL_CALL_EVERY_MS) return;
    this.#lastRollCallMs = clock.nowMs();
    bus.publish(subjects.call, encodeControl({}));
  }

  async #ping(worker: string): Promise<void> {
    const { clock } = this.#options;
    const sentAtMs = clock.unixMs();
    try {
      const reply = await this.#request(worker, { type: "ping", sentAtMs }, PING_TIMEOUT_MS);
      if (reply.type !== "ok" || this.#membership.get(worker)?.state === "lost") return;
      let offset = this.#offsets.get(worker);
      if (!offset) this.#offsets.set(worker, offset = new ClockOffset());
      offset.add(sentAtMs, clock.unixMs(), reply.nowMs);
    } catch { /* beats tell who is gone */ }
  }

  async #request(worker: string, request: ControlRequest, withinMs: number): Promise<ControlReply> {
    const { bus, subjects } = this.#options;
    const answer = await bus.request(subjects.ctl(worker), encodeControl(request), withinMs);
    return decodeControl(ControlReply, answer);
  }

  /** A message at the door; a malformed one is logged and let go. */
  #parse<T>(schema: z.ZodType<T>, message: BusMessage): T | null {
    try {
      return decodeControl(schema, message.data);
    } catch (error) {
      const text = toFleetError(error).message.slice(0, 300);
      this.#options.log("warning", `${message.subject}: ${text}`);
      return null;
    }
  }
}

/** A worker speaks for itself only: its subject, which permissions guard, names it. */
function speaker({ subject }: BusMessage): string {
  return subject.split(".").at(-1)!;
}
