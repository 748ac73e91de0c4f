/**
 * Objects in JetStream, in the layout of NATS' object store (so that NATS' own tools read them), with
 * what the client's lacks: bounded memory, objects that are checked for completeness, and reads that
 * need no consumer.
 *
 * An object is a run of chunks on a subject of its own, and a description that is written last: an
 * upload that breaks off leaves no object. Chunks are read by their sequence numbers with direct gets,
 * a few in flight, so reading needs one read-only permission and leaves nothing at the server.
 *
 * @module
 */
import { headers, type JetStreamManager, type Msg, type NatsConnection, nuid } from "nats.ws";
import { createHash } from "node:crypto";
import { z } from "zod";
import { FleetError } from "./errors.ts";
import { explainRequestError, isNatsError } from "./nats_errors.ts";

/** Of a stored object. */
export interface StoredObject {
  name: string;
  /** Names the subject of its chunks. */
  nuid: string;
  size: number;
  chunks: number;
  /** Sequence numbers of the chunks, when whoever put it wrote them down. */
  sequences: number[] | null;
}

/** How to reach a bucket. */
export interface ObjectStoreOptions {
  connection: NatsConnection;
  bucket: string;
  /**
   * A request without an answer for this long has failed; 10 s when absent. Up to eight chunks share
   * the wire, so a link needs 4 MiB in that time.
   */
  requestTimeoutMs?: number;
}

/** Small enough to leave room for other messages on the wire, large enough to amortize the answer. */
const CHUNK_BYTES = 512 * 1024;
/** Chunks under way of one object. */
const CHUNKS_IN_FLIGHT = 4;
/** Descriptions looked at together. */
const LOOKUPS_IN_FLIGHT = 16;
/** What JetStream stores beside a chunk's bytes, at most. */
const OVERHEAD_PER_CHUNK = 512;

const Meta = z.object({
  name: z.string(),
  nuid: z.string(),
  size: z.number().int().min(0),
  chunks: z.number().int().min(0),
  deleted: z.boolean().optional(),
  metadata: z.record(z.string(), z.string()).nullish(),
});
const Ack = z.object({
  seq: z.number().int().optional(),
  error: z.object({ description: z.string(), err_code: z.number().optional() }).optional(),
});

/** A bucket. */
export class ObjectStore {
  readonly #options: ObjectStoreOptions;
  readonly #stream: string;
  readonly #timeout: number;

  constructor(options: ObjectStoreOptions) {
    this.#options = options;
    this.#stream = `OBJ_${options.bucket}`;
    this.#timeout = options.requestTimeoutMs ?? 10_000;
  }

  /**
   * The object of this name, as described; null when there is none.
   *
   * @throws FleetError `nats`, `timeout` or `unauthorized`
   */
  async info(name: string): Promise<StoredObject | null> {
    const subject = this.#metaSubject(name);
    const message = await this.#direct({ last_by_subj: subject });
    if (!message) return null;
    let meta: z.infer<typeof Meta>;
    try {
      meta = Meta.parse(JSON.parse(new TextDecoder().decode(message.data)));
    } catch (cause) {
      throw new FleetError("nats", `The description of object ${name} is malformed`, { cause });
    }
    if (meta.deleted) return null;
    const sequences = parseRanges(meta.metadata?.sequences, meta.chunks);
    return { name: meta.name, nuid: meta.nuid, size: meta.size, chunks: meta.chunks, sequences };
  }

  /**
   * The bytes of an object, chunk by chunk, in order; no more is asked for than is taken.
   *
   * @throws FleetError `not-found` when a chunk is missing; `nats`, `timeout`
   */
  async *read(object: StoredObject): AsyncGenerator<Uint8Array> {
    const subject = this.#chunkSubject(object.nuid);
    if (!object.sequences) {
      for (let i = 0, next = 1; i < object.chunks; i++) {
        const message = await this.#chunk(object, subject, next);
        next = Number(message.headers?.get("Nats-Sequence")) + 1;
        yield message.data;
      }
      return;
    }
    const inFlight: Promise<Msg>[] = [];
    const ask = (sequence: number) => {
      const asked = this.#chunk(object, subject, sequence);
      // Whoever stops reading early does not wait for the rest.
      asked.catch(() => {});
      inFlight.push(asked);
    };
    for (const sequence of object.sequences.slice(0, CHUNKS_IN_FLIGHT)) ask(sequence);
    for (let i = 0; i < object.chunks; i++) {
      const { data } = await inFlight.shift()!;
      const next = i + CHUNKS_IN_FLIGHT;
      if (next < object.chunks) ask(object.sequences[next]);
      yield data;
    }
  }

  /**
   * Stores an object under `name`; a part of one that stays behind when this fails is removed.
   *
   * @param slices its bytes
   * @param digest SHA-256 that the bytes must have, hex
   * @throws FleetError `bad-checkpoint` when they have not; `disk` when the store is full
   */
  async write(
    name: string,
    slices: AsyncIterable<Uint8Array> | Iterable<Uint8Array>,
    digest: string,
  ): Promise<void> {
    const id = nuid.next();
    try {
      await this.#write(name, id, slices, digest);
    } catch (error) {
      await this.#purge(this.#chunkSubject(id)).catch(() => {});
      throw error;
    }
  }

  async #write(
    name: string,
    id: string,
    slices: AsyncIterable<Uint8Array> | Iterable<Uint8Array>,
    digest: string,
  ): Promise<void> {
    const subject = this.#chunkSubject(id);
    const hash = createHash("sha256");
    const sequences: number[] = [], inFlight: Promise<number>[] = [];
    let size = 0, chunks = 0;
    const settle = async () => sequences.push(await inFlight.shift()!);
    for await (const slice of slices) {
      hash.update(slice);
      size += slice.length;
      for (let at = 0; at < slice.length; at += CHUNK_BYTES) {
        if (inFlight.length >= CHUNKS_IN_FLIGHT) await settle();
        const stored = this.#store(subject, slice.subarray(at, at + CHUNK_BYTES));
        stored.catch(() => {});
        inFlight.push(stored);
        chunks++;
      }
    }
    while (inFlight.length > 0) await settle();
    const found = hash.digest();
    if (found.toString("hex") !== digest) {
      throw new FleetError(
        "bad-checkpoint",
        `The bytes of ${name} changed while they were uploaded; was the checkpoint modified?`,
      );
    }
    if (sequences.some((sequence, i) => i > 0 && sequence <= sequences[i - 1])) {
      throw new FleetError("nats", `The chunks of ${name} were stored out of order`);
    }
    const meta = {
      name,
      description: "",
      bucket: this.#options.bucket,
      nuid: id,
      size,
      mtime: new Date().toISOString(),
      chunks,
      digest: `SHA-256=${base64Url(found)}`,
      deleted: false,
      options: { max_chunk_size: CHUNK_BYTES },
      metadata: { sequences: formatRanges(sequences) },
    };
    await this.#store(
      this.#metaSubject(name),
      new TextEncoder().encode(JSON.stringify(meta)),
      true,
    );
  }

  /**
   * Names of all whole objects, with their sizes. What interrupted uploads left is removed, and so
   * would be an upload that is under way elsewhere: a bucket has one writer.
   */
  async tidy(): Promise<Map<string, number>> {
    const { streams } = await this.#manager();
    const info = await this.#ask(() =>
      streams.info(this.#stream, { subjects_filter: `$O.${this.#options.bucket}.>` })
    );
    const counts = new Map(Object.entries(info.state.subjects ?? {}));
    const chunkPrefix = this.#chunkSubject(""), metaPrefix = this.#metaSubject("");
    const names = [...counts.keys()].filter((subject) => subject.startsWith(metaPrefix))
      .map((subject) => fromBase64Url(subject.slice(metaPrefix.length)));
    const whole = new Map<string, number>();
    for (let at = 0; at < names.length; at += LOOKUPS_IN_FLIGHT) {
      const batch = names.slice(at, at + LOOKUPS_IN_FLIGHT);
      for (const object of await Promise.all(batch.map((name) => this.info(name)))) {
        if (!object) continue;
        const subject = this.#chunkSubject(object.nuid);
        if ((counts.get(subject) ?? 0) !== object.chunks) continue;
        counts.delete(subject);
        whole.set(object.name, object.size);
      }
    }
    for (const subject of counts.keys()) {
      if (subject.startsWith(chunkPrefix)) await this.#purge(subject);
    }
    return whole;
  }

  /** Removes an object. */
  async remove(name: string): Promise<void> {
    const object = await this.info(name);
    if (!object) return;
    await this.#purge(this.#metaSubject(name));
    await this.#purge(this.#chunkSubject(object.nuid));
  }

  /** Makes the bucket where it is missing, without room reserved. */
  async ensure(): Promise<void> {
    const { streams } = await this.#manager();
    try {
      await streams.info(this.#stream);
    } catch (error) {
      if (!isNatsError(error, "404")) throw this.#explain(error);
      const { bucket } = this.#options;
      await this.#ask(() =>
        streams.add({
          name: this.#stream,
          subjects: [`$O.${bucket}.C.>`, `$O.${bucket}.M.>`],
          // JetStream's words for: refuse what does not fit, answer direct gets, replace by rollup.
          discard: "new" as never,
          allow_direct: true,
          allow_rollup_hdrs: true,
        })
      );
    }
  }

  /**
   * Reserves room for objects that are to come, so that an upload does not fail half way.
   *
   * @throws FleetError `disk` when the server or the account has not that much
   */
  async reserve(objects: number, bytes: number): Promise<void> {
    const { streams } = await this.#manager();
    const { config, state } = await this.#ask(() => streams.info(this.#stream));
    const chunks = bytes / CHUNK_BYTES + 2 * objects;
    const wanted = Math.ceil(state.bytes + bytes + chunks * OVERHEAD_PER_CHUNK + objects * 4096);
    if (config.max_bytes > 0 && config.max_bytes >= wanted) return;
    await this.#ask(() => streams.update(this.#stream, { ...config, max_bytes: wanted }));
  }

  async #manager(): Promise<JetStreamManager> {
    return await this.#ask(() =>
      this.#options.connection.jetstreamManager({ timeout: this.#timeout, checkAPI: false })
    );
  }

  async #ask<T>(request: () => Promise<T>): Promise<T> {
    try {
      return await request();
    } catch (error) {
      throw this.#explain(error);
    }
  }

  async #purge(subject: string): Promise<void> {
    const { streams } = await this.#manager();
    await this.#ask(() => streams.purge(this.#stream, { filter: subject }));
  }

  async #request(subject: string, data: Uint8Array, rollup = false): Promise<Msg> {
    const extra = rollup ? { headers: headers() } : {};
    extra.headers?.set("Nats-Rollup", "sub");
    try {
      return await this.#options.connection.request(subject, data, {
        timeout: this.#timeout,
        ...extra,
      });
    } catch (error) {
      throw explainRequestError(subject, this.#timeout, error);
    }
  }

  async #direct(query: Record<string, unknown>): Promise<Msg | null> {
    const subject = `$JS.API.DIRECT.GET.${this.#stream}`;
    const message = await this.#request(subject, new TextEncoder().encode(JSON.stringify(query)));
    const status = message.headers?.code ?? 0;
    if (status === 404) return null;
    if (status >= 400) {
      throw new FleetError(
        "nats",
        `The object store answers ${status} to ${JSON.stringify(query)}`,
      );
    }
    return message;
  }

  async #chunk(object: StoredObject, subject: string, sequence: number): Promise<Msg> {
    const message = await this.#direct({ seq: sequence, next_by_subj: subject });
    if (!message) {
      throw new FleetError("not-found", `A chunk of object ${object.name} is missing in the store`);
    }
    return message;
  }

  /** Publishes and waits until it is stored; the sequence number. */
  async #store(subject: string, data: Uint8Array, rollup = false): Promise<number> {
    const answer = await this.#request(subject, data, rollup);
    const { seq, error } = Ack.parse(answer.json());
    if (error) throw this.#explain(new Error(error.description));
    return seq ?? 0;
  }

  #explain(error: unknown): FleetError {
    const text = error instanceof Error ? error.message : String(error);
    if (/insufficient|exceed|no space|resource/i.test(text)) {
      return new FleetError("disk", `JetStream has no room for the weights: ${text}`, {
        cause: error,
      });
    }
    return explainRequestError(`the object store ${this.#options.bucket}`, this.#timeout, error);
  }

  #chunkSubject(id: string): string {
    return `$O.${this.#options.bucket}.C.${id}`;
  }

  #metaSubject(name: string): string {
    return `$O.${this.#options.bucket}.M.${base64Url(new TextEncoder().encode(name))}`;
  }
}

/** "1-5,9": runs of consecutive numbers. */
export function formatRanges(numbers: number[]): string {
  const runs: [first: number, last: number][] = [];
  for (const number of numbers) {
    const run = runs.at(-1);
    if (run && number === run[1] + 1) run[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([first, last]) => first === last ? `${first}` : `${first}-${last}`).join(",");
}

/** The inverse of {@linkcode formatRanges}; null when it is not exactly `count` numbers. */
export function parseRanges(text: string | undefined, count: number): number[] | null {
  if (!text || !/^\d+(-\d+)?(,\d+(-\d+)?)*$/.test(text)) return null;
  const numbers: number[] = [];
  for (const run of text.split(",")) {
    const [first, last = first] = run.split("-").map(Number);
    if (last - first >= count - numbers.length) return null;
    for (let number = first; number <= last; number++) numbers.push(number);
  }
  return numbers.length === count ? numbers : null;
}

function base64Url(bytes: Uint8Array): string {
  return new Uint8Array(bytes).toBase64({ alphabet: "base64url" });
}

function fromBase64Url(text: string): string {
  return new TextDecoder().decode(Uint8Array.fromBase64(text, { alphabet: "base64url" }));
}
