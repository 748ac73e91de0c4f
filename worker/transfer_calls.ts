/**
 * What the main thread asks of the transfer thread.
 *
 * @module
 */
import type { PartRef } from "../shared/protocol.ts";
import type { PartLocation } from "./part_location.ts";
import type { PartProgress } from "./worker.ts";

/** Where parts may come from, and where they are kept. */
export interface TransferOptions {
  nats: { url: string; name: string; credentialsFile?: string; caFile?: string };
  prefix: string;
  cache: { directory: string; limitBytes: number };
  /** A checkpoint on this machine, read in place where its digests are the fleet's. */
  modelDirectory?: string;
}

/** The calls. `held` are the digests of the parts that need no download. */
export type TransferCalls = {
  /** Opens the cache and the checkpoint. Notes are lines for the log. */
  open: { args: TransferOptions; result: { held: string[] }; note: string };
  /** Makes parts readable, in the order asked for. Notes tell of downloads. */
  provide: {
    args: { parts: PartRef[] };
    result: { locations: PartLocation[]; held: string[] };
    note: PartProgress;
  };
  /** Closes the connection, if there is one. */
  close: { args: null; result: void };
};
