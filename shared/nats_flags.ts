/**
 * The flags with which every process of a fleet finds and greets its NATS.
 *
 * @module
 */
import type { Flag } from "./flags.ts";
import { DEFAULT_NATS_URL, DEFAULT_PREFIX } from "./protocol.ts";

/** Spread into a command's flags. */
export const NATS_FLAGS = {
  nats: {
    type: "string",
    env: "CODEGEMM_NATS",
    default: DEFAULT_NATS_URL,
    help: "websocket URL of nats-server",
  },
  prefix: {
    type: "string",
    env: "CODEGEMM_PREFIX",
    default: DEFAULT_PREFIX,
    help: "first token of the fleet's subjects",
  },
  credentials: {
    type: "path",
    env: "CODEGEMM_NATS_CREDENTIALS",
    help: "file with what NATS asks for",
  },
  ca: { type: "path", env: "CODEGEMM_NATS_CA", help: "file with NATS' certificate authority" },
} as const satisfies Record<string, Flag>;
