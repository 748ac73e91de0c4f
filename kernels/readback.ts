/**
 * Bytes from the GPU to the CPU at every step, without the sleep that Deno puts behind an awaited
 * `mapAsync` (10 ms, whatever the work).
 *
 * In Deno `mapAsync` itself blocks until the GPU is done, so `getMappedRange()` right behind it, not
 * awaited, already works. It waits for everything that was submitted, later steps too (wgpu polls the
 * device for its last submission): so a step that should be read soon has nothing behind it, and the
 * next one is submitted the moment the wait is over. Three rules make it safe:
 *
 * 1. Every staging buffer is mapped once with an awaited `mapAsync` at creation. Before that,
 *    `getMappedRange()` takes the whole process down.
 * 2. Promises of maps that nobody awaits settle only when the event loop turns; {@linkcode Readback}
 *    counts them and lets the loop turn when too many are open.
 * 3. After an invalid submit the mapped range holds stale bytes and no error is thrown. So each copy
 *    carries a number of its turn behind the data, and a read that finds another number there fails.
 *
 * Whether the way without waiting gives right bytes on this platform is tried at creation; where it
 * does not (a browser, another implementation), reads await.
 *
 * @module
 */
import { FleetError, invariant } from "../shared/errors.ts";
import { type Random, seededRandom } from "../shared/random.ts";
import type { Gpu } from "./gpu.ts";

/** Bytes of a buffer that a step reads. Offset and size are multiples of 4. */
export interface ReadRange {
  buffer: GPUBuffer;
  /** Bytes before the first one. */
  offset: number;
  bytes: number;
}

/** A copy on its way: made while encoding, read once after the submit. */
export interface ReadSlot {
  readonly index: number;
  /** The number that stands behind the data. */
  readonly ticket: number;
  /** Of all ranges together, which lie one behind the other. */
  readonly bytes: number;
}

/** Maps whose promise has not settled; each holds about 4 KB. */
const MAX_UNSETTLED_MAPS = 256;
/** Bytes of the number behind the data. */
const TICKET_BYTES = 4;
/** Numbers lie ready on the GPU and are used in turn, many times more than there are slots. */
const TICKETS = 1024;
/** Bytes moved on the GPU before a probe's pattern, so that an early look would see it missing. */
const PROBE_BYTES = 1024 * 1024;
/** An even number: the pattern ends where it began. */
const PROBE_LOADS = 8;
const PROBE_ROUNDS = 2;

/** A turn of the event loop. */
const turn = () => new Promise<void>((resolve) => setTimeout(resolve, 0));

/**
 * A bounded set of staging buffers, reused from step to step.
 *
 * @example
 * ```ts ignore
 * const readback = await Readback.create(gpu, 64 * 1024);
 * const encoder = gpu.device.createCommandEncoder();
 * // ... compute passes ...
 * const slot = readback.copy(encoder, [{ buffer: logits, offset: 0, bytes: 4096 }]);
 * gpu.device.queue.submit([encoder.finish()]);
 * const bytes = await readback.read(slot);
 * ```
 */
export class Readback {
  /** The most bytes of one copy. */
  readonly maxBytes: number;
  /** Copies that may be on their way at a time. */
  readonly depth: number;
  readonly #gpu: Gpu;
  readonly #staging: GPUBuffer[];
  /** Words that look like nothing else: `ticketOf(0)`, `ticketOf(1)`, ... */
  readonly #tickets: GPUBuffer;
  readonly #open: (ReadSlot | null)[];
  #copies = 0;
  #unsettledMaps = 0;
  #immediate = false;

  private constructor(gpu: Gpu, maxBytes: number, depth: number) {
    this.#gpu = gpu;
    this.maxBytes = Math.ceil(maxBytes / 4) * 4;
    this.depth = depth;
    const usage = GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST;
    this.#staging = Array.from(
      { length: depth },
      (_, i) => gpu.buffer(`readback ${i}`, this.maxBytes + TICKET_BYTES, usage),
    );
    this.#tickets = gpu.upload(
      "readback tickets",
      Uint32Array.from({ length: TICKETS }, (_, i) => ticketOf(i)),
    );
    this.#open = new Array(depth).fill(null);
  }

  /**
   * Makes and maps the staging buffers, and finds out how they may be read.
   *
   * @param maxBytes the most bytes of one copy
   * @param depth copies that may be on their way at a time
   * @param way `"probe"` finds out whether reads need to wait for the event loop, `"wait"` waits
   * @throws FleetError `out-of-memory`, or `gpu` when the device has failed
   */
  static async create(
    gpu: Gpu,
    maxBytes: number,
    depth = 4,
    way: "probe" | "wait" = "probe",
  ): Promise<Readback> {
    invariant(maxBytes > 0 && depth > 0 && depth < TICKETS, "a readback has bytes and slots");
    const readback = await gpu.allocate(
      "staging buffers",
      () => new Readback(gpu, maxBytes, depth),
    );
    for (const staging of readback.#staging) {
      await staging.mapAsync(GPUMapMode.READ);
      staging.unmap();
    }
    readback.#immediate = way === "probe" && await readback.#probe();
    gpu.check();
    return readback;
  }

  /** Reads do not wait for the event loop. */
  get immediate(): boolean {
    return this.#immediate;
  }

  /** Bytes of staging memory. */
  get memoryBytes(): number {
    return this.#staging.reduce((sum, staging) => sum + staging.size, this.#tickets.size);
  }

  /**
   * Adds to a command encoder (outside a pass) the copies of `ranges` into a free slot. Submit the
   * encoder, then {@linkcode read}; or {@linkcode release} a slot whose encoder is never submitted.
   *
   * @throws Error when all slots are on their way, or the ranges exceed {@linkcode maxBytes}
   */
  copy(encoder: GPUCommandEncoder, ranges: ReadRange[]): ReadSlot {
    const index = this.#open.indexOf(null);
    invariant(index >= 0, `at most ${this.depth} copies are on their way`);
    const bytes = ranges.reduce((sum, range) => sum + range.bytes, 0);
    invariant(bytes <= this.maxBytes, `${bytes} bytes fit a readback of ${this.maxBytes}`);
    const staging = this.#staging[index];
    let at = 0;
    for (const range of ranges) {
      invariant(range.offset % 4 === 0 && range.bytes % 4 === 0, "read ranges are whole words");
      if (range.bytes === 0) continue;
      encoder.copyBufferToBuffer(range.buffer, range.offset, staging, at, range.bytes);
      at += range.bytes;
    }
    const turn = this.#copies++ % TICKETS;
    const slot = { index, ticket: ticketOf(turn), bytes };
    encoder.copyBufferToBuffer(this.#tickets, turn * TICKET_BYTES, staging, at, TICKET_BYTES);
    this.#open[index] = slot;
    return slot;
  }

  /**
   * Waits for the submitted copy and frees its slot. Where reads are {@linkcode immediate}, it waits
   * for all that has been submitted, not for this copy alone. Where the bytes go is made ready before
   * the wait: the first touch of new memory takes ten times as long as the copy.
   *
   * @param whenDone called between the wait and the fetching: the place to give the GPU its next work
   * @returns the ranges' bytes one behind the other, in a buffer of their own
   * @throws FleetError `gpu` when the device has failed, or the submit with the copy never ran
   */
  async read(slot: ReadSlot, whenDone?: () => void): Promise<Uint8Array<ArrayBuffer>> {
    this.#checkOpen(slot);
    try {
      this.#gpu.check();
      const bytes = new Uint8Array(slot.bytes + TICKET_BYTES).fill(0);
      const mapped = this.#map(slot);
      if (!this.#immediate) await mapped;
      whenDone?.();
      this.#take(slot, bytes);
      const ticket = new DataView(bytes.buffer).getUint32(slot.bytes, true);
      if (ticket !== slot.ticket) {
        await turn(); // so that the device's own account of it, if any, comes first
        this.#gpu.check();
        throw new FleetError("gpu", `${this.#gpu.info.name}: the work of a step was never run`);
      }
      this.#gpu.check();
      return bytes.subarray(0, slot.bytes);
    } catch (cause) {
      if (cause instanceof FleetError) throw cause;
      throw new FleetError("gpu", `${this.#gpu.info.name}: a read failed: ${cause}`, { cause });
    } finally {
      this.#open[slot.index] = null;
      while (this.#unsettledMaps >= MAX_UNSETTLED_MAPS) await turn();
    }
  }

  /** Gives back a slot whose copy was encoded but never submitted. */
  release(slot: ReadSlot): void {
    this.#checkOpen(slot);
    this.#open[slot.index] = null;
  }

  /** Frees the staging buffers; idempotent. */
  destroy(): void {
    for (const staging of this.#staging) staging.destroy();
    this.#tickets.destroy();
  }

  #checkOpen(slot: ReadSlot): void {
    invariant(this.#open[slot.index] === slot, "a slot is read or released once");
  }

  /** In Deno it returns when the GPU is done, though its promise settles later. */
  #map(slot: ReadSlot): Promise<undefined> {
    const settled = () => void this.#unsettledMaps--;
    this.#unsettledMaps++;
    const mapped = this.#staging[slot.index].mapAsync(
      GPUMapMode.READ,
      0,
      slot.bytes + TICKET_BYTES,
    );
    mapped.then(settled, settled);
    return mapped;
  }

  /** Data and ticket of a slot that is mapped, into `bytes`. */
  #take(slot: ReadSlot, bytes: Uint8Array): void {
    const staging = this.#staging[slot.index];
    bytes.set(new Uint8Array(staging.getMappedRange(0, bytes.length)));
    staging.unmap();
  }

  /** Whether reading at once gives right bytes: random patterns, behind enough work to be late. */
  async #probe(): Promise<boolean> {
    const usage = GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    const load = [0, 1].map((i) => this.#gpu.buffer(`readback probe ${i}`, PROBE_BYTES, usage));
    const random = seededRandom(1);
    try {
      for (let round = 0; round < PROBE_ROUNDS; round++) {
        const probes = this.#staging.map(() => this.#submitProbe(load, random));
        for (const { slot, pattern } of probes) {
          const bytes = this.#tryReadNow(slot);
          this.#open[slot.index] = null;
          if (!bytes || !sameBytes(bytes.subarray(0, slot.bytes), pattern)) return false;
        }
      }
      return true;
    } finally {
      this.#open.fill(null);
      while (this.#unsettledMaps > 0) await turn();
      for (const buffer of load) buffer.destroy();
    }
  }

  #submitProbe(load: GPUBuffer[], random: Random) {
    const pattern = randomWords(random, Math.min(this.maxBytes, PROBE_BYTES) / 4);
    this.#gpu.write(load[0], 0, pattern);
    const encoder = this.#gpu.device.createCommandEncoder();
    for (let i = 0; i < PROBE_LOADS; i++) {
      encoder.copyBufferToBuffer(load[i % 2], 0, load[1 - i % 2], 0, PROBE_BYTES);
    }
    const slot = this.copy(encoder, [{ buffer: load[0], offset: 0, bytes: pattern.byteLength }]);
    this.#gpu.device.queue.submit([encoder.finish()]);
    return { slot, pattern };
  }

  #tryReadNow(slot: ReadSlot): Uint8Array | null {
    try {
      const bytes = new Uint8Array(slot.bytes + TICKET_BYTES);
      this.#map(slot);
      this.#take(slot, bytes);
      return bytes;
    } catch {
      this.#staging[slot.index].unmap();
      return null;
    }
  }
}

/** The number of turn `turn`: an odd factor makes no two alike. */
function ticketOf(turn: number): number {
  return Math.imul(turn + 1, 0x9e3779b1) >>> 0;
}

function randomWords(random: Random, words: number): Uint32Array<ArrayBuffer> {
  return Uint32Array.from({ length: words }, () => Math.floor(random() * 2 ** 32));
}

function sameBytes(bytes: Uint8Array, words: Uint32Array): boolean {
  const expected = new Uint8Array(words.buffer, words.byteOffset, words.byteLength);
  return bytes.length === expected.length && bytes.every((byte, i) => byte === expected[i]);
}
