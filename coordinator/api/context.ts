/**
 * What every route of the API is given.
 *
 * @module
 */
import type { ChatTemplate } from "../../shared/chat_template.ts";
import type { Clock } from "../../shared/clock.ts";
import type { TextTokenizer } from "../../shared/tokenizer.ts";
import type { Engine } from "../engine.ts";
import type { Metrics } from "../metrics.ts";
import type { FleetEvent } from "../snapshot.ts";

/** The parts of the coordinator that the API stands in front of. */
export interface ApiContext {
  engine: Engine;
  tokenizer: TextTokenizer;
  /** Null for a model without a chat template: it serves completions only. */
  chatTemplate: ChatTemplate | null;
  clock: Clock;
  /** 64 random bits: the seed of a request that names none, and the ids of answers. */
  randomSeed: () => bigint;
  /** Any of them opens what needs a key; when empty nothing does. */
  apiKeys: readonly string[];
  metrics: Metrics;
  log: (level: FleetEvent["level"], text: string) => void;
}
