/**
 * The main thread's end of the transfer thread: a part provider whose downloads, hashes and files
 * never keep the beats waiting.
 *
 * @module
 */
import type { FleetError } from "../shared/errors.ts";
import type { PartRef } from "../shared/protocol.ts";
import type { PartLocation } from "./part_location.ts";
import { Thread } from "./thread.ts";
import type { TransferCalls, TransferOptions } from "./transfer_calls.ts";
import type { PartProgress, PartProvider } from "./worker.ts";

/** Parts, fetched by another thread. */
export class TransferClient implements PartProvider<PartLocation> {
  /** Resolves when the thread is dead. */
  readonly death: Promise<FleetError>;
  readonly #thread = new Thread<TransferCalls>(
    new URL("./transfer_thread.ts", import.meta.url),
    "transfer",
  );
  #held: string[] = [];

  constructor() {
    this.death = this.#thread.death;
  }

  /**
   * Opens the cache, and the checkpoint whose parts are read in place.
   *
   * @throws FleetError `disk`, `bad-checkpoint`
   */
  async open(options: TransferOptions, onProgress: (line: string) => void): Promise<void> {
    const { held } = await this.#thread.call("open", options, { onNote: onProgress });
    this.#held = held;
  }

  held(): string[] {
    return this.#held;
  }

  async provide(
    parts: PartRef[],
    onProgress: (progress: PartProgress) => void,
    signal: AbortSignal,
  ): Promise<PartLocation[]> {
    const options = { onNote: onProgress, signal };
    const { locations, held } = await this.#thread.call("provide", { parts }, options);
    this.#held = held;
    return locations;
  }

  /** Closes the connection and ends the thread. */
  async close(): Promise<void> {
    await this.#thread.call("close", null).catch(() => {});
    this.#thread.close();
  }
}
