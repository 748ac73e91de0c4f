/**
 * The one place where a failure becomes an HTTP status and an error in OpenAI's shape.
 *
 * @module
 */
import { HTTPException } from "hono/http-exception";
import { FleetError, type FleetErrorCode, toFleetError } from "../../shared/errors.ts";

/** OpenAI's shape of an error, as the body of an answer or as a data event in mid-stream. */
export interface OpenAiError {
  error: { message: string; type: string; param: string | null; code: string | null };
}

/** A failure as the client gets to see it. */
export interface ApiFailure {
  status: number;
  headers: Record<string, string>;
  body: OpenAiError;
  /** The process is to blame, not the request: it belongs in the log. */
  ours: boolean;
}

/** Seconds after which a client that met a full queue or no pipeline may come back. */
const RETRY_AFTER_S = 1;

const INVALID = "invalid_request_error";
const SERVER = "server_error";

/** How each {@linkcode FleetErrorCode} looks over HTTP. */
const SHAPES: Record<FleetErrorCode, { status: number; type: string; code: string | null }> = {
  "bad-request": { status: 400, type: INVALID, code: null },
  "not-found": { status: 404, type: INVALID, code: "model_not_found" },
  "unauthorized": { status: 401, type: INVALID, code: "invalid_api_key" },
  "too-large": { status: 400, type: INVALID, code: "context_length_exceeded" },
  "overloaded": { status: 429, type: "rate_limit_error", code: "overloaded" },
  "unavailable": { status: 503, type: SERVER, code: "unavailable" },
  "timeout": { status: 503, type: SERVER, code: "timeout" },
  "cancelled": { status: 499, type: INVALID, code: "cancelled" },
  "bad-checkpoint": { status: 500, type: SERVER, code: "bad_checkpoint" },
  "bad-frame": { status: 500, type: SERVER, code: "bad_frame" },
  "out-of-memory": { status: 503, type: SERVER, code: "out_of_memory" },
  "gpu": { status: 503, type: SERVER, code: "gpu" },
  "nats": { status: 503, type: SERVER, code: "nats" },
  "bad-usage": { status: 500, type: SERVER, code: "bad_usage" },
  "disk": { status: 500, type: SERVER, code: "disk" },
  "internal": { status: 500, type: SERVER, code: "internal" },
};

/** Codes of failures that HTTP itself names (a route, a method, a body), by status. */
const HTTP_CODES: Record<number, string> = {
  404: "not_found",
  405: "method_not_allowed",
  413: "body_too_large",
  415: "unsupported_media_type",
};

/**
 * What a client is told about any thrown value. A `FleetError` speaks for itself, an
 * `HTTPException` is a failure of the HTTP request as such, and anything else is a defect whose
 * words stay in our log.
 */
export function toApiFailure(error: unknown): ApiFailure {
  if (error instanceof HTTPException) {
    const code = HTTP_CODES[error.status] ?? null;
    return failure(error.status, error.message, INVALID, null, code);
  }
  if (error instanceof FleetError) {
    const { status, type, code } = SHAPES[error.code];
    return failure(status, error.message, type, error.param ?? null, code);
  }
  const message = "The server failed on this request; its log says why";
  return failure(500, message, SERVER, null, "internal");
}

function failure(
  status: number,
  message: string,
  type: string,
  param: string | null,
  code: string | null,
): ApiFailure {
  const headers: Record<string, string> = {};
  if (status === 429 || status === 503) headers["retry-after"] = String(RETRY_AFTER_S);
  if (status === 401) headers["www-authenticate"] = "Bearer";
  return { status, headers, body: { error: { message, type, param, code } }, ours: status >= 500 };
}

/** A failure as an answer. */
export function failureResponse({ status, headers, body }: ApiFailure): Response {
  return Response.json(body, { status, headers });
}

/** An error for the log: with the code, and the place of a defect, which a client is not told. */
export function logText(error: unknown): string {
  const { code, message } = toFleetError(error);
  const stack = error instanceof Error && !(error instanceof FleetError) ? error.stack : undefined;
  return `${code}: ${stack ?? message}`;
}
