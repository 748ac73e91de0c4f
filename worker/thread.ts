/**
 * Calls from one thread to another, typed at both ends: a map of calls says what each takes, gives
 * back, and tells on its way. Buffers move; they are not copied.
 *
 * @module
 */
import { setImmediate } from "node:timers";
import { FleetError, type FleetErrorCode, toFleetError } from "../shared/errors.ts";

/** A map of calls. Everything in it must survive structured cloning. */
export type Calls = Record<string, { args: unknown; result: unknown; note?: unknown }>;

type Note<C extends Calls, K extends keyof C> = C[K] extends { note: infer N } ? N : never;

/** From the caller. `call` and `args` belong together as the map of calls says. */
type Request<C extends Calls> =
  | { type: "call"; id: number; call: keyof C; args: unknown }
  | { type: "abort"; id: number }
  /** Comes first: one word that counts what was sent after it, and wakes a thread that waits for it. */
  | { type: "bell"; bell: SharedArrayBuffer };

/** From the thread. */
type Reply =
  | { type: "done"; id: number; result: unknown }
  | { type: "failed"; id: number; code: FleetErrorCode; message: string }
  | { type: "note"; id: number; note: unknown };

/** How a call is made. */
export interface CallOptions<N> {
  /** Buffers within the arguments that move to the thread. */
  transfer?: Transferable[];
  onNote?: (note: N) => void;
  /** Aborts the handler's own signal; the call still ends as the handler ends it. */
  signal?: AbortSignal;
}

interface Pending {
  resolve(result: unknown): void;
  reject(error: FleetError): void;
  onNote?: (note: unknown) => void;
}

/** The caller's end of a thread. */
export class Thread<C extends Calls> {
  /** Why the thread is dead; resolves once, and only when it was not closed. */
  readonly death: Promise<FleetError>;
  readonly #worker: Worker;
  readonly #bell = new Int32Array(new SharedArrayBuffer(4));
  readonly #pending = new Map<number, Pending>();
  #calls = 0;
  #dead: FleetError | null = null;

  /**
   * @param url the module that calls {@linkcode serveThread}
   * @param name for messages and debuggers
   */
  constructor(url: URL, name: string) {
    this.#worker = new Worker(url, { type: "module", name });
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    const bell: Request<C> = { type: "bell", bell: this.#bell.buffer as SharedArrayBuffer };
    this.#worker.postMessage(bell);
    this.death = new Promise((resolve) => {
      this.#worker.onerror = (event) => {
        // Without this, Deno ends the whole process.
        event.preventDefault();
        resolve(this.#end(new FleetError("internal", `The ${name} thread died: ${event.message}`)));
      };
    });
  }

  /** @throws (rejects) FleetError, the handler's or because the thread died or was closed */
  call<K extends keyof C>(
    call: K,
    args: C[K]["args"],
    options: CallOptions<Note<C, K>> = {},
  ): Promise<C[K]["result"]> {
    if (this.#dead) return Promise.reject(this.#dead);
    const id = this.#calls++;
    return new Promise((resolve, reject) => {
      const abort = () => this.#send({ type: "abort", id });
      const settle = <T>(end: (value: T) => void) => (value: T) => {
        options.signal?.removeEventListener("abort", abort);
        end(value);
      };
      this.#pending.set(id, {
        resolve: settle(resolve),
        reject: settle(reject),
        onNote: options.onNote as (note: unknown) => void,
      });
      this.#send({ type: "call", id, call, args }, options.transfer);
      if (options.signal?.aborted) abort();
      else options.signal?.addEventListener("abort", abort, { once: true });
    });
  }

  /** Ends the thread at once; calls in progress are rejected. Idempotent. */
  close(): void {
    this.#end(new FleetError("cancelled", "The thread was closed"));
  }

  /** The bell rings behind the message: whoever hears it finds the message there. */
  #send(request: Request<C>, transfer: Transferable[] = []): void {
    this.#worker.postMessage(request, transfer);
    Atomics.add(this.#bell, 0, 1);
    Atomics.notify(this.#bell, 0);
  }

  #end(error: FleetError): FleetError {
    if (this.#dead) return this.#dead;
    this.#dead = error;
    this.#worker.terminate();
    for (const { reject } of this.#pending.values()) reject(error);
    this.#pending.clear();
    return error;
  }

  #receive(reply: Reply): void {
    const pending = this.#pending.get(reply.id);
    if (!pending) return;
    if (reply.type === "note") return pending.onNote?.(reply.note);
    this.#pending.delete(reply.id);
    if (reply.type === "done") pending.resolve(reply.result);
    else pending.reject(new FleetError(reply.code, reply.message));
  }
}

/** What a handler may do beside returning. */
export interface CallContext<N> {
  tell(note: N): void;
  /** Buffers within the result that move to the caller. */
  transfer: Transferable[];
  signal: AbortSignal;
}

/** What a thread does for each call. Calls run side by side as far as their handlers await. */
export type Handlers<C extends Calls> = {
  [K in keyof C]: (
    args: C[K]["args"],
    context: CallContext<Note<C, K>>,
  ) => C[K]["result"] | Promise<C[K]["result"]>;
};

/** The part of a thread's global scope that it speaks through. */
interface ThreadScope {
  onmessage: ((event: MessageEvent) => void) | null;
  postMessage(message: unknown, transfer: Transferable[]): void;
}

/** What comes to a thread. */
export interface Mailbox {
  /**
   * Blocks the thread until a message is sent, `ms` at most, and resolves once those sent by then have
   * come to their handlers. A timer would be a millisecond late, and so would a message that finds the
   * thread asleep in one.
   */
  wait(ms: number): Promise<void>;
}

class ThreadMailbox implements Mailbox {
  #bell: Int32Array | null = null;
  /** Messages that have come, as the bell counts them. */
  #taken = 0;

  open(bell: SharedArrayBuffer): void {
    this.#bell = new Int32Array(bell);
  }

  take(): void {
    this.#taken = (this.#taken + 1) | 0;
  }

  async wait(ms: number): Promise<void> {
    const bell = this.#bell;
    if (bell && ms > 0) {
      const heard = Atomics.load(bell, 0);
      // A message may come before the bell behind it rings: there is nothing left then, but that ring
      // is still to be waited for, or every wait would end at once until the sender gets to it.
      if (this.#left(heard) <= 0) Atomics.wait(bell, 0, heard, ms);
    }
    do await turnOfLoop(); while (bell && this.#left(Atomics.load(bell, 0)) > 0);
  }

  /** How many of the messages that the bell has rung for have not come yet. */
  #left(heard: number): number {
    return (heard - this.#taken) | 0;
  }
}

/**
 * A turn of the event loop with messages from other threads in it. A message to oneself comes back
 * more than a hundred times before Deno looks for theirs, a timer is a millisecond late.
 */
function turnOfLoop(): Promise<void> {
  return new Promise((resolve) => void setImmediate(resolve));
}

/** The thread's end: answers calls from now on. */
export function serveThread<C extends Calls>(handlers: Handlers<C>): Mailbox {
  const scope = globalThis as unknown as ThreadScope;
  const running = new Map<number, AbortController>();
  const mailbox = new ThreadMailbox();
  scope.onmessage = async ({ data }: MessageEvent<Request<C>>) => {
    if (data.type === "bell") return mailbox.open(data.bell);
    mailbox.take();
    const { id } = data;
    if (data.type === "abort") return running.get(id)?.abort();
    const { call, args } = data;
    const send = (reply: Reply, transfer: Transferable[] = []) =>
      scope.postMessage(reply, transfer);
    const abort = new AbortController();
    running.set(id, abort);
    const transfer: Transferable[] = [];
    const tell = (note: unknown) => send({ type: "note", id, note });
    try {
      const result = await handlers[call](args, { tell, transfer, signal: abort.signal });
      send({ type: "done", id, result }, transfer);
    } catch (thrown) {
      const { code, message } = toFleetError(thrown);
      send({ type: "failed", id, code, message });
    } finally {
      running.delete(id);
    }
  };
  return mailbox;
}
