/**
 * Who is in the fleet. Pure: cards, beats, disconnects and the time go in, what changed comes out.
 *
 * A worker *process* is an instance; a restarted worker of the same name is another one. An instance
 * that was declared lost stays lost: its beats are ignored until it (or its successor) says hello
 * again with a card, and then it is a newcomer that serves no epoch. Of two processes that run under
 * one name the one that came last counts; the other is told off once and not listened to while its
 * successor lives, so that they do not take turns.
 *
 * @module
 */
import { LIMITS } from "../shared/limits.ts";
import { type Beat, COORDINATOR, PROTOCOL_VERSION, type WorkerCard } from "../shared/protocol.ts";

/** A worker as membership knows it. */
export interface Member {
  card: WorkerCard;
  /** `refused` ones beat, but get no stage: see `note`. `leaving` ones should lose theirs. */
  state: "alive" | "leaving" | "refused" | "lost";
  /** Why it is refused, lost or leaving; empty otherwise. */
  note: string;
  joinedAtMs: number;
  lastBeatAtMs: number;
  /** The latest beat; null before the first. */
  beat: Beat | null;
  /** Processes of its name that were there when it came, newest first. */
  replaced: readonly string[];
}

/** What changed. */
export type MembershipEvent =
  | { type: "joined"; worker: string; instance: string }
  /** An instance is gone: dead, disconnected, restarted under the same name, or done leaving. */
  | { type: "lost"; worker: string; instance: string; reason: string }
  | { type: "leaving"; worker: string; instance: string }
  | { type: "refused"; worker: string; instance: string; reason: string }
  /** A process that was replaced by another of its name is still there. Told once. */
  | { type: "namesake"; worker: string; instance: string }
  /** The state a worker gives in its beats, or the epoch, is another than before. */
  | { type: "changed"; worker: string; instance: string };

/** Bounds; {@linkcode LIMITS} by default. */
export interface MembershipOptions {
  deadAfterMs?: number;
  maxWorkers?: number;
  /** How long a lost worker stays in the picture. */
  forgetAfterMs?: number;
}

/** The workers of a fleet. */
export class Membership {
  readonly #deadAfterMs: number;
  readonly #maxWorkers: number;
  readonly #forgetAfterMs: number;
  #members = new Map<string, Member>();

  constructor(options: MembershipOptions = {}) {
    this.#deadAfterMs = options.deadAfterMs ?? LIMITS.deadAfterMs;
    this.#maxWorkers = options.maxWorkers ?? LIMITS.maxWorkers;
    this.#forgetAfterMs = options.forgetAfterMs ?? 10 * 60_000;
  }

  /** Every worker known, lost ones too, by name. */
  get members(): Member[] {
    return [...this.#members.values()].sort((a, b) => a.card.worker < b.card.worker ? -1 : 1);
  }

  /** The workers that can be given a stage. */
  get usable(): Member[] {
    return this.members.filter(({ state }) => state === "alive");
  }

  get(worker: string): Member | undefined {
    return this.#members.get(worker);
  }

  /** Whether this very instance is here, and not lost: what it reports may be acted on. */
  isPresent(worker: string, instance: string): boolean {
    const member = this.#members.get(worker);
    return member !== undefined && member.state !== "lost" && member.card.instance === instance;
  }

  /** A worker says what it is: at its start, and at every roll call. */
  hello(card: WorkerCard, nowMs: number): MembershipEvent[] {
    const { worker, instance } = card;
    const known = this.#members.get(worker);
    const events: MembershipEvent[] = [];
    if (known && this.isPresent(worker, instance)) {
      // The answer to a roll call: the card may list other cached parts by now.
      known.card = card;
      known.lastBeatAtMs = nowMs;
      return events;
    }
    if (this.#isReplaced(worker, instance)) return this.#turnAway(known!, instance);
    if (!known && !this.#makeRoom()) {
      const reason = `The fleet has ${this.#maxWorkers} workers, and takes no more`;
      return [{ type: "refused", worker, instance, reason }];
    }
    let replaced: string[] = [];
    if (known && known.state !== "lost") {
      replaced = [known.card.instance, ...known.replaced].slice(0, MOST_REPLACED);
      events.push(this.#lose(known, "another process took its name"));
    }
    const reason = refusal(card);
    this.#members.set(worker, {
      card,
      state: reason ? "refused" : "alive",
      note: reason ?? "",
      joinedAtMs: nowMs,
      lastBeatAtMs: nowMs,
      beat: null,
      replaced,
    });
    events.push(
      reason ? { type: "refused", worker, instance, reason } : { type: "joined", worker, instance },
    );
    return events;
  }

  /**
   * A sign of life.
   *
   * @returns what changed, or null when the instance is unknown or lost: then ask for its card (a
   * roll call), for only a card makes it a member again
   */
  beat(beat: Beat, nowMs: number): MembershipEvent[] | null {
    const { worker, instance } = beat;
    if (this.#isReplaced(worker, instance)) return [];
    if (!this.isPresent(worker, instance)) return null;
    const member = this.#members.get(worker)!;
    // Beats of one worker arrive in order; an older one can only be a double.
    if (member.beat && beat.sequence <= member.beat.sequence) return [];
    const changed = member.beat?.state !== beat.state || member.beat.epoch !== beat.epoch;
    member.beat = beat;
    member.lastBeatAtMs = nowMs;
    return changed ? [{ type: "changed", worker, instance }] : [];
  }

  /** The worker asks to leave: it gets no new stage, and keeps its old one until that has moved. */
  leaving(worker: string, instance: string): MembershipEvent[] {
    if (!this.isPresent(worker, instance)) return [];
    const member = this.#members.get(worker)!;
    if (member.state !== "alive") return [];
    member.state = "leaving";
    member.note = "is leaving";
    return [{ type: "leaving", worker, instance }];
  }

  /** The bus says that a worker is gone (a disconnect, no responders). */
  disconnected(worker: string, reason: string): MembershipEvent[] {
    const member = this.#members.get(worker);
    if (!member || member.state === "lost") return [];
    return [this.#lose(member, reason)];
  }

  /** Time passes: who has not beaten for too long is lost, who has long been lost is forgotten. */
  tick(nowMs: number): MembershipEvent[] {
    const events: MembershipEvent[] = [];
    for (const member of this.members) {
      const silentMs = nowMs - member.lastBeatAtMs;
      if (member.state !== "lost" && silentMs >= this.#deadAfterMs) {
        events.push(this.#lose(member, `no beat for ${Math.round(silentMs)} ms`));
      } else if (member.state === "lost" && silentMs >= this.#forgetAfterMs) {
        this.#members.delete(member.card.worker);
      }
    }
    return events;
  }

  /** Nobody could be heard for the last `ms`: they do not count as anybody's silence. */
  excuse(ms: number, nowMs: number): void {
    for (const member of this.#members.values()) {
      if (member.state === "lost") continue;
      member.lastBeatAtMs = Math.min(nowMs, member.lastBeatAtMs + ms);
    }
  }

  /** When {@linkcode tick} next has something to say if nobody beats; null when nobody is there. */
  get nextTickMs(): number | null {
    const due = this.members.filter(({ state }) => state !== "lost")
      .map(({ lastBeatAtMs }) => lastBeatAtMs + this.#deadAfterMs);
    return due.length > 0 ? Math.min(...due) : null;
  }

  #isReplaced(worker: string, instance: string): boolean {
    const member = this.#members.get(worker);
    return member !== undefined && member.state !== "lost" && member.replaced.includes(instance);
  }

  /** A process whose name another one has taken over speaks. */
  #turnAway(successor: Member, instance: string): MembershipEvent[] {
    if (successor.note !== "") return [];
    successor.note = "another process under this name was turned away: each needs its own --name";
    return [{ type: "namesake", worker: successor.card.worker, instance }];
  }

  /** Whether there is a place for one more; who was lost first makes way. */
  #makeRoom(): boolean {
    if (this.#members.size < this.#maxWorkers) return true;
    const lost = this.members.filter(({ state }) => state === "lost");
    if (lost.length === 0) return false;
    const longest = lost.reduce((a, b) => a.lastBeatAtMs <= b.lastBeatAtMs ? a : b);
    return this.#members.delete(longest.card.worker);
  }

  #lose(member: Member, reason: string): MembershipEvent {
    member.state = "lost";
    member.note = reason;
    const { worker, instance } = member.card;
    return { type: "lost", worker, instance, reason };
  }
}

/** Earlier processes of a name that are remembered. */
const MOST_REPLACED = 16;

/** Why a worker cannot serve, or null. */
function refusal({ version, worker }: WorkerCard): string | null {
  if (worker === COORDINATOR) return `The name ${COORDINATOR} is taken; give it another --name`;
  return version === PROTOCOL_VERSION ? null : otherVersion(version);
}

/** Why a worker of another protocol version cannot serve. */
export function otherVersion(version: number): string {
  return `It speaks protocol version ${version}, the coordinator ${PROTOCOL_VERSION}; ` +
    "run the same release on both";
}
