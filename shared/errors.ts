/**
 * The one coded error for the world's failures. Our own mistakes are `assert`s ({@linkcode invariant}).
 *
 * @module
 */

/**
 * What went wrong, as a word that programs can act on. `coordinator/api` maps each to an HTTP status
 * in one place.
 */
export type FleetErrorCode =
  /** The caller's request is malformed or asks for something unsupported. */
  | "bad-request"
  /** The request names something that is not there (a model, a file, a tensor). */
  | "not-found"
  /** A missing or wrong API key, or NATS credentials that were refused. */
  | "unauthorized"
  /** A prompt that does not fit the context, or a body over its bound. */
  | "too-large"
  /** Every place in the queue is taken; try again later. */
  | "overloaded"
  /** No pipeline is serving (workers missing, loading, or lost). */
  | "unavailable"
  /** Something took longer than its bound. */
  | "timeout"
  /** The client went away, or the work was called off. */
  | "cancelled"
  /** A checkpoint that is truncated, contradictory or of a kind we cannot run. */
  | "bad-checkpoint"
  /** A frame or control message that does not parse, or does not belong here. */
  | "bad-frame"
  /** Memory of the fleet or of a GPU does not suffice. */
  | "out-of-memory"
  /** A GPU or adapter that is missing, unsuited, lost or failed its self-test. */
  | "gpu"
  /** NATS: unreachable, no websocket listener, no JetStream, no responders. */
  | "nats"
  /** A command line or environment variable that does not parse. */
  | "bad-usage"
  /** Disk: full, unreadable, not writable. */
  | "disk"
  /** Anything else; a defect of ours until shown otherwise. */
  | "internal";

/**
 * A failure of the world: what was asked, what stood in the way, what to do.
 *
 * @example
 * ```ts
 * import { FleetError } from "./errors.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const error = new FleetError("too-large", "The prompt has 9000 tokens, the context 8192; shorten it");
 * assertEquals(error.code, "too-large");
 * ```
 */
export class FleetError extends Error {
  override readonly name = "FleetError";
  readonly code: FleetErrorCode;
  /** The request field that is to blame, for OpenAI-shaped errors. */
  readonly param?: string;

  constructor(
    code: FleetErrorCode,
    message: string,
    options: { cause?: unknown; param?: string } = {},
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    if (options.param !== undefined) this.param = options.param;
  }
}

/** Any thrown value as a {@linkcode FleetError}; what is not one becomes `internal`. */
export function toFleetError(error: unknown): FleetError {
  if (error instanceof FleetError) return error;
  const message = error instanceof Error ? error.message : String(error);
  return new FleetError("internal", message, { cause: error });
}

/** An always-on check of our own reasoning: throws a plain `Error`, which no one catches by code. */
export function invariant(condition: unknown, message: string): asserts condition {
  if (!condition) throw new Error(`Invariant violated: ${message}`);
}
