/**
 * The bus, as the rest of the code sees it: subjects, bytes, at most once, in order per publisher and
 * subject. `nats_bus.ts` is the real one, `memory_bus.ts` runs in one process and can lose, delay and
 * double messages.
 *
 * @module
 */

/** A message as delivered. `data` belongs to the receiver. */
export interface BusMessage {
  subject: string;
  data: Uint8Array<ArrayBuffer>;
  /** Answers a request; absent when the sender expects no answer. */
  respond?: (data: Uint8Array) => void;
}

/** A live subscription. */
export interface Subscription {
  unsubscribe(): void;
}

/** What the bus itself goes through. */
export type BusStatus = "connected" | "disconnected" | "closed";

/** At-most-once publish and subscribe with NATS' subject syntax (`*` one token, `>` the rest). */
export interface Bus {
  /** The largest message, bytes. */
  readonly maxPayloadBytes: number;
  readonly status: BusStatus;
  /**
   * Sends and forgets: during an outage the message is lost without an error.
   *
   * @throws FleetError `too-large` when `data` exceeds {@linkcode maxPayloadBytes}
   */
  publish(subject: string, data: Uint8Array): void;
  /** Handlers run one at a time per subscription, in order; one that throws is logged, not fatal. */
  subscribe(pattern: string, handler: (message: BusMessage) => void): Subscription;
  /**
   * @throws FleetError `nats` when nobody listens, `timeout` when nobody answers in time
   */
  request(subject: string, data: Uint8Array, timeoutMs: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Calls `handler` at every change of {@linkcode status}; returns how to stop. */
  onStatus(handler: (status: BusStatus) => void): Subscription;
  /** Resolves when everything published so far has reached the server. */
  flush(): Promise<void>;
  /** Flushes and closes; idempotent. */
  close(): Promise<void>;
}
