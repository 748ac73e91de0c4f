/**
 * A bus within one process, for tests and simulation: it keeps the promises of `bus.ts` and, where
 * asked, breaks what the real one may break. Messages get lost, come late or twice, and endpoints are
 * cut off; one seed replays all of it.
 *
 * Messages of one publisher on one subject arrive in the order they were sent, late ones too: a
 * message holds back those behind it. Only the second copy of a doubled message may come out of order,
 * as a frame of a slow or restarted sender would.
 *
 * @module
 */
import type { Bus, BusMessage, BusStatus, Subscription } from "./bus.ts";
import type { Clock } from "./clock.ts";
import { FleetError } from "./errors.ts";
import { LIMITS } from "./limits.ts";
import { type Random, seededRandom } from "./random.ts";
import { subjectMatches } from "./subject.ts";

/** What happens to messages. Probabilities are per message, 0 to 1. */
export interface BusFaults {
  lose: number;
  double: number;
  delay: number;
  /** A delayed message or second copy comes up to this much later. */
  maxDelayMs: number;
  /** Which subjects suffer; all of them when absent. */
  subject?: (subject: string) => boolean;
}

/** How a {@linkcode MemoryHub} behaves. */
export interface MemoryHubOptions {
  clock: Clock;
  /** Of the faults; 1 when absent. */
  seed?: number;
  /** Time of a message from publisher to subscriber, ms; 0 when absent. */
  latencyMs?: number;
  maxPayloadBytes?: number;
}

/** What became of messages since the hub was made. */
export interface BusCounts {
  published: number;
  delivered: number;
  lost: number;
  doubled: number;
  delayed: number;
}

interface Envelope {
  subject: string;
  data: Uint8Array<ArrayBuffer>;
  reply: string | undefined;
}

interface Listener {
  pattern: string;
  endpoint: MemoryBus;
  handler: (message: BusMessage) => void;
}

/** The server's part: connects endpoints, carries and breaks messages. */
export class MemoryHub {
  readonly clock: Clock;
  readonly maxPayloadBytes: number;
  /** Faults from now on; none when null. */
  faults: BusFaults | null = null;
  readonly counts: BusCounts = { published: 0, delivered: 0, lost: 0, doubled: 0, delayed: 0 };
  readonly #latencyMs: number;
  readonly #random: Random;
  readonly #listeners = new Set<Listener>();
  /** Messages on their way, per publisher and subject, in order. */
  readonly #lanes = new Map<string, { queue: Envelope[]; dueMs: number }>();
  #connections = 0;

  constructor(options: MemoryHubOptions) {
    this.clock = options.clock;
    this.#latencyMs = options.latencyMs ?? 0;
    this.maxPayloadBytes = options.maxPayloadBytes ?? LIMITS.maxFrameBytes;
    this.#random = seededRandom(options.seed ?? 1);
  }

  /** A new endpoint; `name` is for people, several may share one. */
  connect(name: string): MemoryBus {
    return new MemoryBus(this, `${name}.${this.#connections++}`);
  }

  /** Whether anybody who is connected listens to `subject`. */
  heard(subject: string): boolean {
    return this.#matching(subject).length > 0;
  }

  /** @internal */
  add(listener: Listener): Subscription {
    this.#listeners.add(listener);
    return { unsubscribe: () => void this.#listeners.delete(listener) };
  }

  /** Takes a message from an endpoint. @internal */
  carry(publisher: string, message: Envelope): void {
    this.counts.published++;
    const faults = this.faults?.subject?.(message.subject) === false ? null : this.faults;
    const strikes = (probability: number) => probability > 0 && this.#random() < probability;
    if (faults && strikes(faults.lose)) {
      this.counts.lost++;
      return;
    }
    const { maxDelayMs } = faults ?? { maxDelayMs: 0 };
    let delayMs = this.#latencyMs;
    if (faults && strikes(faults.delay)) {
      this.counts.delayed++;
      delayMs += this.#random() * maxDelayMs;
    }
    this.#enqueue(`${publisher} ${message.subject}`, message, delayMs);
    if (faults && strikes(faults.double)) {
      this.counts.doubled++;
      const copy = { ...message, data: message.data.slice() };
      this.clock.after(
        this.#latencyMs + this.#random() * maxDelayMs,
        () => this.#deliver(copy),
      );
    }
  }

  /** Each timer takes the head of its lane, so that whatever the clock does, order is kept. */
  #enqueue(key: string, message: Envelope, delayMs: number): void {
    let lane = this.#lanes.get(key);
    if (!lane) this.#lanes.set(key, lane = { queue: [], dueMs: 0 });
    const nowMs = this.clock.nowMs();
    lane.queue.push(message);
    lane.dueMs = Math.max(lane.dueMs, nowMs + delayMs);
    this.clock.after(lane.dueMs - nowMs, () => {
      const head = lane.queue.shift()!;
      if (lane.queue.length === 0) this.#lanes.delete(key);
      this.#deliver(head);
    });
  }

  #deliver(message: Envelope): void {
    for (const listener of this.#matching(message.subject)) {
      // An earlier listener may have cut this one off or ended it.
      if (!this.#listeners.has(listener) || listener.endpoint.status !== "connected") continue;
      this.counts.delivered++;
      const { subject, reply } = message;
      const received: BusMessage = { subject, data: message.data.slice() };
      if (reply !== undefined) {
        received.respond = (data) => listener.endpoint.publish(reply, data);
      }
      try {
        listener.handler(received);
      } catch (error) {
        console.error(`The handler of ${listener.pattern} failed:`, error);
      }
    }
  }

  #matching(subject: string): Listener[] {
    return [...this.#listeners].filter((listener) =>
      listener.endpoint.status === "connected" && subjectMatches(listener.pattern, subject)
    );
  }
}

/** One connection to a {@linkcode MemoryHub}. */
export class MemoryBus implements Bus {
  readonly maxPayloadBytes: number;
  readonly #hub: MemoryHub;
  readonly #name: string;
  readonly #subscriptions = new Set<Subscription>();
  readonly #statusHandlers = new Set<(status: BusStatus) => void>();
  #status: BusStatus = "connected";
  #requests = 0;

  /** Use {@linkcode MemoryHub.connect}. */
  constructor(hub: MemoryHub, name: string) {
    this.#hub = hub;
    this.#name = name;
    this.maxPayloadBytes = hub.maxPayloadBytes;
  }

  get status(): BusStatus {
    return this.#status;
  }

  /** Loses the connection: what it publishes and what is on its way to it is lost. */
  cut(): void {
    if (this.#status === "connected") this.#become("disconnected");
  }

  /** Finds the connection again, with its subscriptions. */
  restore(): void {
    if (this.#status === "disconnected") this.#become("connected");
  }

  publish(subject: string, data: Uint8Array): void {
    this.#send(subject, data, undefined);
  }

  subscribe(pattern: string, handler: (message: BusMessage) => void): Subscription {
    this.#checkOpen();
    const listening = this.#hub.add({ pattern, endpoint: this, handler });
    const subscription = {
      unsubscribe: () => {
        listening.unsubscribe();
        this.#subscriptions.delete(subscription);
      },
    };
    this.#subscriptions.add(subscription);
    return subscription;
  }

  request(subject: string, data: Uint8Array, timeoutMs: number): Promise<Uint8Array<ArrayBuffer>> {
    return new Promise((resolve, reject) => {
      const inbox = `_INBOX.${this.#name}.${this.#requests++}`;
      const settle = (end: () => void) => {
        timer.cancel();
        answers.unsubscribe();
        end();
      };
      const answers = this.subscribe(inbox, (answer) => settle(() => resolve(answer.data)));
      const timer = this.#hub.clock.after(
        this.#status === "connected" && !this.#hub.heard(subject) ? 0 : timeoutMs,
        () =>
          settle(() =>
            reject(
              this.#hub.heard(subject)
                ? new FleetError("timeout", `No answer on ${subject} within ${timeoutMs} ms`)
                : new FleetError("nats", `Nobody listens on ${subject}`),
            )
          ),
      );
      try {
        this.#send(subject, data, inbox);
      } catch (error) {
        settle(() => reject(error));
      }
    });
  }

  onStatus(handler: (status: BusStatus) => void): Subscription {
    this.#statusHandlers.add(handler);
    return { unsubscribe: () => void this.#statusHandlers.delete(handler) };
  }

  /** The hub has a message as soon as it is published. */
  flush(): Promise<void> {
    return Promise.resolve();
  }

  close(): Promise<void> {
    if (this.#status !== "closed") {
      for (const subscription of [...this.#subscriptions]) subscription.unsubscribe();
      this.#become("closed");
    }
    return Promise.resolve();
  }

  #send(subject: string, data: Uint8Array, reply: string | undefined): void {
    this.#checkOpen();
    if (data.byteLength > this.maxPayloadBytes) {
      throw new FleetError(
        "too-large",
        `A message of ${data.byteLength} bytes on ${subject} exceeds the bus' ${this.maxPayloadBytes}`,
      );
    }
    if (this.#status === "connected") {
      this.#hub.carry(this.#name, { subject, data: new Uint8Array(data), reply });
    }
  }

  #checkOpen(): void {
    if (this.#status === "closed") throw new FleetError("nats", "The connection is closed");
  }

  #become(status: BusStatus): void {
    this.#status = status;
    for (const handler of [...this.#statusHandlers]) handler(status);
  }
}
