/**
 * One coordinator at a time: a lease in a JetStream KV bucket, taken and renewed by compare-and-set,
 * with the last epoch beside it so that epochs grow over restarts.
 *
 * @module
 */
import { z } from "zod";
import type { Clock, Timer } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";

/** The part of a KV bucket that a lease needs; revisions are compared and set. */
export interface LeaseStore {
  /** Null when the key was never written. */
  get(key: string): Promise<{ value: Uint8Array; revision: number } | null>;
  /** @throws when the key's revision is another (0: it exists) */
  update(key: string, value: Uint8Array, revision: number): Promise<number>;
}

const LeaseRecord = z.object({
  holder: z.string(),
  /** The holder renews long before; past it anyone may take the lease. */
  expiresAtUnixMs: z.number(),
  epoch: z.number().int().min(0),
});
type LeaseRecord = z.infer<typeof LeaseRecord>;

const KEY = "coordinator";
const LEASE_MS = 5_000;
const RENEW_EVERY_MS = 1_500;

/** The right to be the fleet's coordinator. */
export class Lease {
  readonly #store: LeaseStore;
  readonly #clock: Clock;
  readonly #holder: string;
  readonly #onLost: (error: FleetError) => void;
  #record: LeaseRecord;
  #revision: number;
  #timer: Timer | null = null;
  /** Writes follow each other: each needs the revision of the one before. */
  #writing: Promise<void> = Promise.resolve();

  private constructor(
    store: LeaseStore,
    clock: Clock,
    onLost: (error: FleetError) => void,
    record: LeaseRecord,
    revision: number,
  ) {
    this.#store = store;
    this.#clock = clock;
    this.#holder = record.holder;
    this.#onLost = onLost;
    this.#record = record;
    this.#revision = revision;
    this.#arm();
  }

  /**
   * Takes the lease, or says who has it.
   *
   * @param holder this process, unlike any other
   * @param onLost called once when the lease could not be renewed in time or was taken by another:
   *   the coordinator must stop at once
   * @throws FleetError `unavailable` while another coordinator holds it
   */
  static async acquire(
    store: LeaseStore,
    clock: Clock,
    holder: string,
    onLost: (error: FleetError) => void,
  ): Promise<Lease> {
    const found = await store.get(KEY);
    const before = found ? parse(found.value) : null;
    if (before && before.holder !== holder && before.expiresAtUnixMs > clock.unixMs()) {
      const seconds = Math.ceil((before.expiresAtUnixMs - clock.unixMs()) / 1000);
      throw new FleetError(
        "unavailable",
        `Another coordinator (${before.holder}) serves this fleet; stop it, or wait ${seconds} s ` +
          "if it has died, or use another --prefix",
      );
    }
    const record = {
      holder,
      expiresAtUnixMs: clock.unixMs() + LEASE_MS,
      epoch: before?.epoch ?? 0,
    };
    try {
      const revision = await store.update(KEY, serialize(record), found?.revision ?? 0);
      return new Lease(store, clock, onLost, record, revision);
    } catch (cause) {
      throw new FleetError("unavailable", "Another coordinator took this fleet just now", {
        cause,
      });
    }
  }

  /** The last epoch that was handed out. */
  get epoch(): number {
    return this.#record.epoch;
  }

  /**
   * A new epoch, durable before it is used.
   *
   * @throws FleetError `unavailable` when the lease is lost
   */
  async nextEpoch(): Promise<number> {
    const epoch = this.#record.epoch + 1;
    await this.#write({ epoch });
    return epoch;
  }

  /** Gives the lease back, so that the next coordinator need not wait. */
  async release(): Promise<void> {
    this.#timer?.cancel();
    this.#timer = null;
    await this.#write({ expiresAtUnixMs: 0 }).catch(() => {/* it expires by itself */});
  }

  #arm(): void {
    this.#timer = this.#clock.after(RENEW_EVERY_MS, () => {
      this.#write({}).then(
        () => this.#timer && this.#arm(),
        (error) => this.#retryOrLose(error),
      );
    });
  }

  #retryOrLose(cause: unknown): void {
    if (!this.#timer) return;
    // The bus may be away for a moment; the lease is ours until it expires.
    if (this.#clock.unixMs() < this.#record.expiresAtUnixMs && !(cause instanceof FleetError)) {
      return this.#arm();
    }
    this.#timer = null;
    this.#onLost(
      new FleetError("unavailable", "The coordinator's lease was lost to another", { cause }),
    );
  }

  #write(change: Partial<LeaseRecord>): Promise<void> {
    const write = this.#writing.then(async () => {
      const record = {
        ...this.#record,
        expiresAtUnixMs: this.#clock.unixMs() + LEASE_MS,
        ...change,
      };
      try {
        this.#revision = await this.#store.update(KEY, serialize(record), this.#revision);
      } catch (cause) {
        const found = await this.#store.get(KEY);
        const other = found ? parse(found.value) : null;
        if (found && other?.holder !== this.#holder) {
          throw new FleetError("unavailable", "Another coordinator holds the lease", { cause });
        }
        // Our own earlier write arrived though its answer did not: go on from it.
        this.#revision = await this.#store.update(KEY, serialize(record), found?.revision ?? 0);
      }
      this.#record = record;
    });
    this.#writing = write.catch(() => {});
    return write;
  }
}

function serialize(record: LeaseRecord): Uint8Array {
  return new TextEncoder().encode(JSON.stringify(record));
}

function parse(value: Uint8Array): LeaseRecord | null {
  try {
    return LeaseRecord.parse(JSON.parse(new TextDecoder().decode(value)));
  } catch {
    return null;
  }
}
