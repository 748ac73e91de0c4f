/**
 * The coordinator's ear for workers: cards, beats and reports from the bus into membership, pings for
 * round trips and clocks, and who is left out for a while.
 *
 * @module
 */
import type { z } from "zod";
import type { Bus, BusMessage, Subscription } from "../shared/bus.ts";
import type { Clock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import {
  Beat,
  ControlReply,
  type ControlRequest,
  decodeControl,
  encodeControl,
  PROTOCOL_VERSION,
  type Subjects,
  WorkerCard,
  WorkerIdentity,
  WorkerReport,
} from "../shared/protocol.ts";
import type { FleetLog, Rejections } from "./fleet_log.ts";
import { ClockOffset } from "./latency.ts";
import { type Member, Membership, type MembershipEvent, otherVersion } from "./membership.ts";
import { Probation } from "./probation.ts";

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
  log: FleetLog;
  rejections: Rejections;
}

const PING_EVERY_MS = 1_000;
const PING_TIMEOUT_MS = 900;
const ROLL_CALL_EVERY_MS = 1_000;
/** A tick that comes so much later than the one before: this process was busy, and beats are waiting. */
const DEAF_AFTER_MS = 200;
/** Twice: the first call may come before the server has taken note itself. */
const STILL_THERE_MS = [100, 900];

/** Who is there, and how far away. */
export class Roster {
  readonly #options: RosterOptions;
  readonly #membership = new Membership();
  readonly #offsets = new Map<string, ClockOffset>();
  readonly #probation = new Probation();
  #subscriptions: Subscription[] = [];
  #lastTickMs = -Infinity;
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
        log.add("bus", status === "connected" ? "info" : "warning", `the bus is ${status}`);
        if (status !== "connected") return;
        this.#membership.excuse(Infinity, this.#options.clock.nowMs());
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
    const { bus, clock, onRestored } = this.#options;
    const nowMs = clock.nowMs();
    const sinceMs = nowMs - this.#lastTickMs;
    this.#lastTickMs = nowMs;
    // Who hears nothing cannot tell who is silent.
    if (bus.status !== "connected") return;
    if (sinceMs > DEAF_AFTER_MS) this.#membership.excuse(sinceMs, nowMs);
    this.#tell(this.#membership.tick(nowMs));
    if (this.#probation.tick(nowMs)) onRestored();
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
    return this.#membership.usable.filter((member) => this.exclusion(member) === null);
  }

  /** The workers that would serve, but are left out because they failed. */
  get excluded(): Member[] {
    return this.#membership.usable.filter((member) => this.exclusion(member) !== null);
  }

  /** Whether this very process is here, and not lost. */
  isPresent(worker: string, instance: string): boolean {
    return this.#membership.isPresent(worker, instance);
  }

  /** The latest beat of a worker; null before the first. */
  beat(worker: string): Beat | null {
    return this.#membership.get(worker)?.beat ?? null;
  }

  /** Why a member is left out for now; null when it is not. */
  exclusion({ card }: Member): string | null {
    return this.#probation.exclusion(card.worker, card.instance, this.#options.clock.nowMs());
  }

  /** Whether a pipeline that works should take this worker in. */
  isSteady(worker: string): boolean {
    return this.#probation.isSteady(worker, this.#options.clock.nowMs());
  }

  /** Leaves a process that failed out of plans for a while. @returns for how long, ms */
  exclude(worker: string, instance: string, reason: string): number {
    return this.#probation.failed(worker, instance, reason, this.#options.clock.nowMs());
  }

  /** Takes note that a worker was lost while it had a stage. */
  strike(worker: string): void {
    this.#probation.lost(worker, this.#options.clock.nowMs());
  }

  /**
   * The bus says that a connection of this name has ended: sooner than beats could tell. But it may
   * be an old connection of a worker that has a new one, or another process of its name; so the name
   * is called once more, and where nobody listens the bus says so within milliseconds.
   */
  async disconnected(worker: string): Promise<void> {
    const { instance } = this.#membership.get(worker)?.card ?? {};
    if (instance === undefined || !this.isPresent(worker, instance)) return;
    for (const withinMs of STILL_THERE_MS) {
      try {
        const sentAtMs = this.#options.clock.unixMs();
        await this.#request(worker, { type: "ping", sentAtMs }, withinMs);
        return;
      } catch (error) {
        // Where somebody listens, though perhaps too busy to answer, beats will tell.
        if (!(error instanceof FleetError) || error.code !== "nats") continue;
        if (!this.isPresent(worker, instance)) return;
        return this.#tell(this.#membership.disconnected(worker, "its connection to NATS ended"));
      }
    }
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
    const card = this.#parse(WorkerCard, message, () => this.#isOfAnotherRelease(message));
    if (!card || !this.#isSpeaker(card, message)) return;
    this.#tell(this.#membership.hello(card, this.#options.clock.nowMs()));
  }

  #beat(message: BusMessage): void {
    const beat = this.#parse(Beat, message);
    if (!beat || !this.#isSpeaker(beat, message)) return;
    const events = this.#membership.beat(beat, this.#options.clock.nowMs());
    if (events === null) this.#rollCall();
    else this.#tell(events);
  }

  #report(message: BusMessage): void {
    const report = this.#parse(WorkerReport, message);
    if (!report) return;
    const worker = speaker(message);
    if (!this.isPresent(worker, report.instance)) {
      this.#options.rejections.count("unknown-process");
    } else if (report.type === "leaving") {
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

  /**
   * A message at the door; a malformed one is counted, told of and let go.
   *
   * @param isExplained whether there is nothing more to say about a malformed one
   */
  #parse<T>(schema: z.ZodType<T>, message: BusMessage, isExplained = () => false): T | null {
    try {
      return decodeControl(schema, message.data);
    } catch (error) {
      if (isExplained()) return null;
      // Only what the door says: anything else is a defect of ours.
      if (!(error instanceof FleetError)) throw error;
      const text = `${message.subject.slice(0, 100)}: ${error.message}`;
      this.#options.rejections.warn("malformed-message", text);
      return null;
    }
  }

  /** A card that does not parse may be that of another release, which says so in the part all share. */
  #isOfAnotherRelease(message: BusMessage): boolean {
    try {
      const { version, worker } = decodeControl(WorkerIdentity, message.data);
      if (version === PROTOCOL_VERSION || worker !== speaker(message)) return false;
      const text = `${worker} is refused: ${otherVersion(version)}`;
      this.#options.rejections.warn("other-version", text);
      return true;
    } catch {
      return false;
    }
  }

  /** A worker speaks for itself only. */
  #isSpeaker({ worker }: { worker: string }, message: BusMessage): boolean {
    if (worker === speaker(message)) return true;
    const text = `${message.subject.slice(0, 100)} speaks in the name of ${worker}`;
    this.#options.rejections.warn("wrong-sender", text);
    return false;
  }
}

/** Who a message is from: its subject, which permissions guard, names the worker. */
function speaker({ subject }: BusMessage): string {
  return subject.split(".").at(-1)!;
}
