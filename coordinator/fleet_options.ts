/**
 * What a fleet is made of and what it serves.
 *
 * @module
 */
import type { Bus } from "../shared/bus.ts";
import type { Clock } from "../shared/clock.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import type { NumericsProfile, PartRef } from "../shared/protocol.ts";
import type { FleetEvent } from "./snapshot.ts";

/** The model that a fleet serves. */
export interface FleetModel {
  id: string;
  createdUnix: number;
  /** "m1v4g128" or "float16". */
  format: string;
  config: ModelConfig;
  configJson: string;
  digest: string;
  parts: readonly PartRef[];
}

/** What a fleet is made of. */
export interface FleetOptions {
  bus: Bus;
  clock: Clock;
  prefix: string;
  model: FleetModel;
  /** A number that was never used before in this fleet, made durable first. */
  nextEpoch: () => Promise<number>;
  /** Longest sequence, tokens. */
  contextTokens: number;
  /** Sequences that should find pages at once; the planner gives what fits. */
  sequences: number;
  objective: "throughput" | "latency";
  /** Wait for this many workers, and use as many stages; null plans with who is there. */
  stages: number | null;
  profile: NumericsProfile;
  log: (event: FleetEvent) => void;
}
