/**
 * The bus over a real NATS server: the official client, on a websocket that sends small frames at
 * once.
 *
 * Deno's own WebSocket holds frames of 1 to 16 KB back for some 40 ms (it writes header and body apart,
 * with Nagle's algorithm on), so the client is given the socket of npm `ws`, which writes them together
 * and turns Nagle off.
 *
 * @module
 */
import {
  connect,
  type ConnectionOptions,
  credsAuthenticator,
  Events,
  type JetStreamAccountStats,
  type NatsConnection,
  nkeyAuthenticator,
} from "nats.ws";
import { WebSocket as NodeWebSocket } from "ws";
import type { Bus, BusMessage, BusStatus, Subscription } from "./bus.ts";
import { FleetError } from "./errors.ts";
import { LIMITS } from "./limits.ts";
import { inboxPrefix } from "./nats_config.ts";
import { explainConnectError, explainRequestError } from "./nats_errors.ts";

/** How to connect. */
export interface NatsOptions {
  /** `ws://host:port` or `wss://host:port`. */
  url: string;
  /** Shown by the server for this connection; also whose inbox answers go to. */
  name: string;
  /**
   * A file with what to show the server: `user:password`, a token, an nkey seed, or NATS' own
   * `.creds`. Never logged.
   */
  credentialsFile?: string;
  /** Certificate authority of the server, PEM; absent: the machine's own. */
  caFile?: string;
  /** Where answers go, when not to the inbox of `name`. */
  inboxPrefix?: string;
  /** The server's payload bound must be at least this; `LIMITS.maxFrameBytes` when absent. */
  minPayloadBytes?: number;
  /** For the first connection; 5 s when absent. */
  timeoutMs?: number;
  /** Hears of each subject that the server keeps this user from, once. */
  onRefused?: (operation: string, subject: string) => void;
}

/** A live connection, seen as a bus and as the client's own (for JetStream). */
export interface NatsLink {
  bus: Bus;
  connection: NatsConnection;
  /** The user of the credentials file; null when it names none. */
  user: string | null;
}

/** Unsent bytes at which messages are dropped, as in an outage: the server has stopped reading. */
const MAX_UNSENT_BYTES = 64 * 1024 * 1024;
/** Subjects hold numbers that change; what is refused is clear after a few. */
const MAX_REFUSALS_TOLD = 20;
const PING_EVERY_MS = 500;
const MAX_PINGS_OUT = 2;
const FLUSH_ON_CLOSE_MS = 1_000;

/**
 * Connects, and reconnects for as long as the bus is open.
 *
 * @throws FleetError `nats` or `unauthorized` that says which part is missing; `bad-usage` for a URL
 * that is no websocket's; `disk` for an unreadable file
 */
export async function connectNats(options: NatsOptions): Promise<NatsLink> {
  const url = websocketUrl(options.url);
  const credentials = options.credentialsFile === undefined
    ? {}
    : parseCredentials(await readTextFile(options.credentialsFile, "NATS credentials"));
  const ca = options.caFile === undefined
    ? undefined
    : await readTextFile(options.caFile, "certificate authority");
  const timeoutMs = options.timeoutMs ?? 5_000;
  const sockets = new Sockets(timeoutMs, ca);
  let connection: NatsConnection;
  try {
    connection = await connect({
      servers: url,
      name: options.name,
      ...credentials,
      inboxPrefix: options.inboxPrefix ?? inboxPrefix(options.name),
      timeout: timeoutMs,
      reconnect: true,
      maxReconnectAttempts: -1,
      reconnectTimeWait: 50,
      reconnectJitter: 20,
      pingInterval: PING_EVERY_MS,
      maxPingOut: MAX_PINGS_OUT,
      ignoreClusterUpdates: true,
      noAsyncTraces: true,
      wsFactory: () => Promise.resolve({ socket: sockets.open(url), encrypted: sockets.encrypted }),
    } as ConnectionOptions);
  } catch (error) {
    const { lastError } = sockets;
    sockets.close();
    throw explainConnectError(url, error, lastError);
  }
  const maxPayloadBytes = connection.info?.max_payload ?? 0;
  const minPayloadBytes = options.minPayloadBytes ?? LIMITS.maxFrameBytes;
  const bus = new NatsBus(connection, sockets, maxPayloadBytes, options.onRefused);
  if (maxPayloadBytes < minPayloadBytes) {
    await bus.close();
    throw new FleetError(
      "nats",
      `The NATS server at ${url} takes messages of at most ${maxPayloadBytes} bytes, ` +
        `${minPayloadBytes} are needed; set max_payload in its configuration`,
    );
  }
  return { bus, connection, user: credentials.user ?? null };
}

/**
 * Checks that JetStream is there for this user.
 *
 * @returns the account's usage and limits
 * @throws FleetError `nats` or `unauthorized`
 */
export async function requireJetStream(
  connection: NatsConnection,
): Promise<JetStreamAccountStats> {
  try {
    return await (await connection.jetstreamManager()).getAccountInfo();
  } catch (error) {
    const explained = explainRequestError("$JS.API.INFO", LIMITS.controlTimeoutMs, error);
    if (explained.code === "unauthorized") throw explained;
    throw new FleetError(
      "nats",
      `The NATS server has no JetStream for this account (${explained.message}); weights and plans ` +
        "are kept there: add a jetstream block to its configuration",
      { cause: error },
    );
  }
}

/** What a credentials file holds, in the words of the client's options. */
export function parseCredentials(
  text: string,
): Pick<ConnectionOptions, "user" | "pass" | "token" | "authenticator"> {
  const content = text.trim();
  if (/-+BEGIN NATS USER JWT-+/.test(content)) {
    return { authenticator: credsAuthenticator(new TextEncoder().encode(text)) };
  }
  if (content === "" || /\s/.test(content)) {
    throw new FleetError(
      "bad-usage",
      "The NATS credentials file must hold user:password, a token, an nkey seed, or NATS credentials",
    );
  }
  if (/^SU[A-Z2-7]{56}$/.test(content)) {
    return { authenticator: nkeyAuthenticator(new TextEncoder().encode(content)) };
  }
  const colon = content.indexOf(":");
  if (colon < 0) return { token: content };
  return { user: content.slice(0, colon), pass: content.slice(colon + 1) };
}

/** The URL with its port, or why it is none of a websocket. */
function websocketUrl(text: string): string {
  let url: URL;
  try {
    url = new URL(text);
  } catch (cause) {
    throw new FleetError(
      "bad-usage",
      `${JSON.stringify(text)} is no URL; NATS' is ws://host:port`,
      {
        cause,
      },
    );
  }
  if (url.protocol === "nats:" || url.protocol === "tls:") {
    throw new FleetError(
      "bad-usage",
      `${url.protocol}// is NATS' own protocol; the fleet speaks to its websocket listener: ` +
        "ws://host:port (or wss://) with the port of the websocket block",
    );
  }
  if (url.protocol !== "ws:" && url.protocol !== "wss:") {
    throw new FleetError("bad-usage", `NATS is reached at ws:// or wss://, not ${url.protocol}//`);
  }
  if (url.username || url.password) {
    throw new FleetError(
      "bad-usage",
      "Credentials do not belong into the NATS URL; put them into a file",
    );
  }
  return url.href;
}

async function readTextFile(path: string, what: string): Promise<string> {
  try {
    return await Deno.readTextFile(path);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new FleetError("disk", `Cannot read the ${what} file ${path}: ${reason}`, { cause });
  }
}

/** Opens the client's sockets and keeps hold of the last one. */
class Sockets {
  encrypted = false;
  /** Why the last socket could not be opened. */
  lastError: unknown;
  #socket: WebSocket | undefined;
  #closed = false;
  readonly #timeoutMs: number;
  readonly #ca: string | undefined;

  constructor(timeoutMs: number, ca: string | undefined) {
    this.#timeoutMs = timeoutMs;
    this.#ca = ca;
  }

  open(url: string): WebSocket {
    if (this.#closed) throw new FleetError("nats", "The connection is closed");
    this.encrypted = url.startsWith("wss:");
    this.lastError = undefined;
    const socket = new NodeWebSocket(url, {
      perMessageDeflate: false,
      handshakeTimeout: this.#timeoutMs,
      ca: this.#ca,
    });
    socket.on("error", (error: unknown) => this.lastError = error);
    return this.#socket = socket as unknown as WebSocket;
  }

  /** Bytes handed to the socket that the server has not taken yet. */
  get unsentBytes(): number {
    return this.#socket?.bufferedAmount ?? 0;
  }

  /** Ends the last socket, connected or not, and opens no other. */
  close(): void {
    this.#closed = true;
    (this.#socket as unknown as { terminate?: () => void })?.terminate?.();
  }
}

class NatsBus implements Bus {
  readonly maxPayloadBytes: number;
  readonly #refusals = new Set<string>();
  readonly #onRefused: NatsOptions["onRefused"];
  readonly #connection: NatsConnection;
  readonly #sockets: Sockets;
  readonly #statusHandlers = new Set<(status: BusStatus) => void>();
  #status: BusStatus = "connected";
  #closing: Promise<void> | undefined;

  constructor(
    connection: NatsConnection,
    sockets: Sockets,
    maxPayloadBytes: number,
    onRefused: NatsOptions["onRefused"],
  ) {
    this.#connection = connection;
    this.#sockets = sockets;
    this.maxPayloadBytes = maxPayloadBytes;
    this.#onRefused = onRefused;
    this.#followStatus();
    connection.closed().then(() => this.#become("closed"));
  }

  get status(): BusStatus {
    return this.#status;
  }

  publish(subject: string, data: Uint8Array): void {
    this.#send(subject, data);
  }

  subscribe(pattern: string, handler: (message: BusMessage) => void): Subscription {
    this.#checkOpen();
    const subscription = this.#connection.subscribe(pattern, {
      callback: (error, message) => {
        // A refused subscription; the connection's status tells of it.
        if (error) return;
        const { subject, reply } = message;
        const received: BusMessage = { subject, data: owned(message.data) };
        if (reply) received.respond = (data) => this.#send(reply, data);
        try {
          handler(received);
        } catch (error) {
          console.error(`The handler of ${pattern} failed:`, error);
        }
      },
    });
    return { unsubscribe: () => subscription.unsubscribe() };
  }

  async request(
    subject: string,
    data: Uint8Array,
    timeoutMs: number,
  ): Promise<Uint8Array<ArrayBuffer>> {
    this.#checkOpen();
    this.#checkSize(subject, data);
    try {
      const answer = await this.#connection.request(subject, data.slice(), {
        timeout: Math.max(1, timeoutMs),
      });
      return owned(answer.data);
    } catch (error) {
      throw explainRequestError(subject, timeoutMs, error);
    }
  }

  onStatus(handler: (status: BusStatus) => void): Subscription {
    this.#statusHandlers.add(handler);
    return { unsubscribe: () => void this.#statusHandlers.delete(handler) };
  }

  async flush(): Promise<void> {
    this.#checkOpen();
    try {
      await this.#connection.flush();
    } catch (cause) {
      throw new FleetError("nats", "The connection was lost before everything was sent", { cause });
    }
  }

  close(): Promise<void> {
    return this.#closing ??= this.#close();
  }

  async #close(): Promise<void> {
    if (this.#status === "connected") {
      let timer: ReturnType<typeof setTimeout> | undefined;
      const bound = new Promise<void>((resolve) => timer = setTimeout(resolve, FLUSH_ON_CLOSE_MS));
      await Promise.race([this.#connection.flush().catch(() => {}), bound]);
      clearTimeout(timer);
    }
    const closed = this.#connection.close();
    this.#sockets.close();
    await closed;
    this.#become("closed");
  }

  #send(subject: string, data: Uint8Array): void {
    this.#checkOpen();
    this.#checkSize(subject, data);
    if (this.#status !== "connected" || this.#sockets.unsentBytes > MAX_UNSENT_BYTES) return;
    // The client packs its buffers in a later microtask; until then the bytes must not change.
    this.#connection.publish(subject, data.slice());
  }

  #checkOpen(): void {
    if (this.#status === "closed" || this.#closing) {
      throw new FleetError("nats", "The connection is closed");
    }
  }

  #checkSize(subject: string, data: Uint8Array): void {
    if (data.byteLength > this.maxPayloadBytes) {
      throw new FleetError(
        "too-large",
        `A message of ${data.byteLength} bytes on ${subject} exceeds the server's ` +
          `${this.maxPayloadBytes}`,
      );
    }
  }

  async #followStatus(): Promise<void> {
    for await (const status of this.#connection.status()) {
      if (status.type === Events.Disconnect) this.#become("disconnected");
      else if (status.type === Events.Reconnect) this.#become("connected");
      else if (status.type === Events.Error) {
        const { operation, subject } = status.permissionContext ?? {};
        if (operation && subject) this.#refused(operation, subject);
        else console.error(`NATS reports an error: ${status.data}`);
      }
    }
  }

  /** A beat that is refused is refused again at the next: each subject is told of once. */
  #refused(operation: string, subject: string): void {
    const what = `${operation} to ${subject}`;
    if (this.#refusals.has(what) || this.#refusals.size >= MAX_REFUSALS_TOLD) return;
    this.#refusals.add(what);
    console.error(`NATS refuses this user's ${what}`);
    this.#onRefused?.(operation, subject);
  }

  #become(status: BusStatus): void {
    if (this.#status === status || this.#status === "closed") return;
    this.#status = status;
    for (const handler of [...this.#statusHandlers]) {
      try {
        handler(status);
      } catch (error) {
        console.error("A handler of the connection's status failed:", error);
      }
    }
  }
}

/** The receiver's own bytes: the client delivers views of a buffer that holds other messages too. */
function owned(data: Uint8Array): Uint8Array<ArrayBuffer> {
  const whole = data.byteOffset === 0 && data.byteLength === data.buffer.byteLength;
  return (whole ? data : data.slice()) as Uint8Array<ArrayBuffer>;
}
