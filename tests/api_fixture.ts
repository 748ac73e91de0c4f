/**
 * The API with a stand-in behind it: a tokenizer whose tokens are bytes, and an engine that answers
 * each sequence with the bytes of a scripted text.
 *
 * @module
 */
import { type ApiContext, createApi } from "../coordinator/api/mod.ts";
import type {
  Engine,
  GenerateEvent,
  GenerateRequest,
  Readiness,
  TokenLogprob,
} from "../coordinator/engine.ts";
import { Metrics } from "../coordinator/metrics.ts";
import type { FleetSnapshot } from "../coordinator/snapshot.ts";
import type { ChatTemplate } from "../shared/chat_template.ts";
import { systemClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import type { TextTokenizer } from "../shared/tokenizer.ts";
import { snapshotFixture } from "./snapshot_fixture.ts";

/** Token ids beyond the 256 bytes. */
export const BOS = 256, EOS = 257, VOCAB = 258;

/** Each token is a byte; BOS and EOS have no text. */
export const byteTokenizer: TextTokenizer = {
  encode(text, options) {
    const bytes = new TextEncoder().encode(text);
    const special = options?.addSpecialTokens ?? false;
    return Uint32Array.from(special ? [BOS, ...bytes] : bytes);
  },
  decode: (ids) => new TextDecoder().decode(Uint8Array.from([...ids].filter((id) => id < 256))),
  stream() {
    const decoder = new TextDecoder();
    return {
      push: (token) => token < 256 ? decoder.decode(Uint8Array.of(token), { stream: true }) : "",
      end: () => decoder.decode(),
    };
  },
  tokenText: (id) => String.fromCharCode(id),
  tokenBytes: (id) => Uint8Array.of(...(id < 256 ? [id] : [])),
  bosToken: BOS,
  bosText: "",
  eosText: "",
  vocabSize: VOCAB,
};

/** What the engine answers a sequence with. */
export interface Script {
  /** The answer's bytes, an EOS behind them. */
  text: string;
  /** Thrown after the text, in place of the EOS. */
  failure?: FleetError;
  /** After the text, waits for the signal, as a slow fleet would. */
  hang?: boolean;
}

/** An engine whose answers are written beforehand. */
export class ScriptedEngine implements Engine {
  readonly model = {
    id: "scripted",
    createdUnix: 1_700_000_000,
    contextTokens: 512,
    vocabSize: VOCAB,
    eosTokens: [EOS],
    bosToken: BOS,
  };
  /** Sequences admitted, in order. */
  readonly requests: GenerateRequest[] = [];
  /** Sequences called off. */
  aborted = 0;
  script: (request: GenerateRequest) => Script = () => ({ text: "Hello" });
  /** Thrown instead of admitting, once that many sequences were admitted. */
  refusal: { after: number; error: FleetError } | null = null;
  picture: FleetSnapshot = snapshotFixture();
  ready: Readiness = { ready: true, reason: "A step completed 12 ms ago" };
  readonly #listeners = new Set<() => void>();
  readonly #waiting = new Set<() => void>();

  generate(request: GenerateRequest, signal: AbortSignal): AsyncIterable<GenerateEvent> {
    if (this.refusal && this.requests.length >= this.refusal.after) throw this.refusal.error;
    this.requests.push(request);
    signal.addEventListener("abort", () => {
      this.aborted++;
      this.#changed();
    }, { once: true });
    this.#changed();
    return this.#play(request, signal);
  }

  async *#play(request: GenerateRequest, signal: AbortSignal): AsyncGenerator<GenerateEvent> {
    const { text, failure, hang } = this.script(request);
    const room = Math.min(
      request.maxTokens,
      this.model.contextTokens - request.promptTokens.length + 1,
    );
    let drawn = 0;
    for (const byte of [...new TextEncoder().encode(text), EOS]) {
      await Promise.resolve();
      if (signal.aborted) return;
      if (byte === EOS && failure) throw failure;
      if (byte === EOS && hang) await aborted(signal);
      if (signal.aborted) return;
      const logprob = -0.5 - drawn / 100;
      yield { type: "token", token: byte, logprob, alternatives: rivals(byte, logprob, request) };
      drawn++;
      if (request.stopTokens.includes(byte)) return yield { type: "finish", reason: "stop" };
      if (drawn === room) return yield { type: "finish", reason: "length" };
    }
  }

  snapshot(): FleetSnapshot {
    return this.picture;
  }

  readiness(): Promise<Readiness> {
    return Promise.resolve(this.ready);
  }

  onChange(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Shows another picture to whoever listens. */
  show(picture: FleetSnapshot): void {
    this.picture = picture;
    for (const listener of this.#listeners) listener();
  }

  /** Resolves when `condition` holds, looked at whenever a sequence comes or is called off. */
  until(condition: () => boolean): Promise<void> {
    return new Promise((resolve) => {
      const look = () => {
        if (!condition()) return;
        this.#waiting.delete(look);
        resolve();
      };
      this.#waiting.add(look);
      look();
    });
  }

  #changed(): void {
    for (const look of this.#waiting) look();
  }

  /** How many listen. */
  get listeners(): number {
    return this.#listeners.size;
  }
}

function rivals(token: number, logprob: number, request: GenerateRequest): TokenLogprob[] {
  return Array.from({ length: request.alternatives }, (_, at) => ({
    token: (token + at) % 256,
    logprob: logprob - at,
  }));
}

function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) =>
    signal.addEventListener("abort", () => resolve(), { once: true })
  );
}

/** Writes `<role>content` for each message, and refuses an empty content as real templates do. */
export const plainTemplate: ChatTemplate = {
  render({ messages }) {
    return (messages as { role: string; content: string }[]).map(({ role, content }) => {
      if (content === "") throw new FleetError("bad-request", "The template says: empty message");
      return `<${role}>${content}`;
    }).join("") + "<assistant>";
  },
};

/** An API over a scripted engine; `log` collects what it logs. */
export function scriptedApi(changes: Partial<ApiContext> & { engine?: ScriptedEngine } = {}) {
  const engine = changes.engine ?? new ScriptedEngine();
  const log: string[] = [];
  let seeds = 0n;
  const app = createApi({
    tokenizer: byteTokenizer,
    chatTemplate: plainTemplate,
    clock: systemClock,
    randomSeed: () => 0xabc0n + seeds++,
    apiKeys: [],
    metrics: new Metrics(),
    log: (level, text) => log.push(`${level}: ${text}`),
    ...changes,
    engine,
  });
  return { app, engine, log };
}

/** Serves an app on loopback, on a free port unless one is named. `stop` breaks open streams. */
export function serveOnLoopback(
  app: { fetch: (request: Request) => Response | Promise<Response> },
  port = 0,
) {
  const stopping = new AbortController();
  const server = Deno.serve(
    { hostname: "127.0.0.1", port, signal: stopping.signal, onListen: () => {} },
    (request) => app.fetch(request),
  );
  const stop = async () => {
    stopping.abort();
    await server.finished;
  };
  return { url: `http://127.0.0.1:${server.addr.port}`, port: server.addr.port, stop };
}
