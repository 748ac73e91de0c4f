/**
 * What NATS' client throws, in the fleet's words: which part is missing, and what to do.
 *
 * @module
 */
import { ErrorCode, NatsError } from "nats.ws";
import { FleetError } from "./errors.ts";

/**
 * Why a connection did not come about.
 *
 * @param url where to; without credentials
 * @param error what the client threw
 * @param socketError what the socket threw before that, if it did
 */
export function explainConnectError(
  url: string,
  error: unknown,
  socketError: unknown,
): FleetError {
  const cause = socketError ?? error;
  const nats = (what: string) => new FleetError("nats", what, { cause });
  const text = message(socketError) || message(error);
  const code = property(socketError, "code");
  if (socketError === undefined) {
    switch (property(error, "code")) {
      case ErrorCode.AuthorizationViolation:
      case ErrorCode.AuthenticationTimeout:
      case ErrorCode.BadAuthentication:
        return new FleetError(
          "unauthorized",
          `The NATS server at ${url} refused the credentials; pass the file that "deno task nats" ` +
            "wrote for this user with --credentials",
          { cause },
        );
      case ErrorCode.BadCreds:
        return new FleetError("unauthorized", "The NATS credentials file does not parse", {
          cause,
        });
    }
  }
  if (code === "ENOTFOUND" || code === "EAI_AGAIN") {
    return nats(`The host of ${url} is unknown: ${text}`);
  }
  if (
    ["ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT", "ECONNRESET"].includes(code ?? "")
  ) {
    return nats(
      `Nothing answers at ${url} (${code}); is nats-server running there, and the port open?`,
    );
  }
  if (/SSL|certificate|self.signed|UnknownIssuer|TLS/i.test(`${text} ${code}`)) {
    return nats(
      `The TLS handshake with ${url} failed: ${text}; is the listener wss, and is its ` +
        "certificate authority known (--ca FILE)?",
    );
  }
  if (/Parse Error|Unexpected server response|Invalid Upgrade|Sec-WebSocket/i.test(text)) {
    return nats(
      `${url} answers, but is no websocket listener of this kind (${text}); use the port of the ` +
        "websocket block of nats-server's configuration, and wss:// if that has tls",
    );
  }
  if (/timed? ?out/i.test(text) || property(error, "code") === ErrorCode.Timeout) {
    return nats(`${url} accepts connections but does not answer as a NATS websocket listener`);
  }
  if (/unexpected response/i.test(text)) {
    return nats(`${url} is a websocket, but not NATS'`);
  }
  return nats(`Connecting to NATS at ${url} failed: ${text}`);
}

/** Why a request failed. */
export function explainRequestError(
  subject: string,
  timeoutMs: number,
  error: unknown,
): FleetError {
  if (error instanceof FleetError) return error;
  switch (property(error, "code")) {
    case ErrorCode.NoResponders:
      return new FleetError("nats", `Nobody listens on ${subject}`, { cause: error });
    case ErrorCode.Timeout:
      return new FleetError("timeout", `No answer on ${subject} within ${timeoutMs} ms`, {
        cause: error,
      });
    case ErrorCode.PermissionsViolation:
      return new FleetError(
        "unauthorized",
        `These NATS credentials may not publish to ${subject}`,
        {
          cause: error,
        },
      );
    default:
      return new FleetError("nats", `A request on ${subject} failed: ${message(error)}`, {
        cause: error,
      });
  }
}

/** Whether `error` is NATS' answer with this code. */
export function isNatsError(error: unknown, code: string): boolean {
  return error instanceof NatsError && error.code === code;
}

function message(error: unknown): string {
  return error instanceof Error ? error.message : error === undefined ? "" : String(error);
}

function property(error: unknown, name: string): string | undefined {
  const value = (error as Record<string, unknown> | undefined)?.[name];
  return typeof value === "string" ? value : undefined;
}
