/**
 * Who owns which KV page. Page ids are the same on every stage of a pipeline; the coordinator alone
 * hands them out, workers only ever see page tables.
 *
 * A page is free when no sequence owns it **and** no unfinished step names it: a step that is
 * reissued writes its rows again, so a page it names must not have become another sequence's.
 *
 * @module
 */
import { invariant } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";

/** Pages that hold `positions` positions. */
export function pagesFor(positions: number): number {
  return Math.ceil(positions / LIMITS.pageTokens);
}

const NOBODY = null;

/**
 * The pages `[0, pages)` of one plan.
 *
 * @example
 * ```ts
 * import { KvAllocator } from "./kv_allocator.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const kv = new KvAllocator(4);
 * kv.grow("a", 40); // two pages of 32 positions
 * kv.pin(1, kv.table("a"));
 * kv.release("a");
 * assertEquals(kv.free, 2); // step 1 still names the other two
 * kv.unpin(1);
 * assertEquals(kv.free, 4);
 * ```
 */
export class KvAllocator {
  readonly pages: number;
  /** Free pages; the last one is handed out next. */
  #free: number[];
  #owner: (string | null)[];
  #pins: Uint32Array;
  #tables = new Map<string, number[]>();
  #pinnedBy = new Map<number, number[]>();
  /** Pages without an owner that wait for a step to finish. */
  #leaving = 0;

  constructor(pages: number) {
    invariant(Number.isInteger(pages) && pages >= 1, `${pages} pages`);
    this.pages = pages;
    this.#free = Array.from({ length: pages }, (_, i) => pages - 1 - i);
    this.#owner = new Array(pages).fill(NOBODY);
    this.#pins = new Uint32Array(pages);
  }

  /** Pages that can be handed out now. */
  get free(): number {
    return this.#free.length;
  }

  /** Pages that are owned or named by an unfinished step. */
  get used(): number {
    return this.pages - this.#free.length;
  }

  /** Pages that become free as soon as the steps that name them finish. */
  get leaving(): number {
    return this.#leaving;
  }

  /** The page table of a sequence: entry `i` holds positions `[32 i, 32 i + 32)`. */
  table(sequence: string): readonly number[] {
    return this.#tables.get(sequence) ?? [];
  }

  /** Pages that `sequence` lacks to hold `positions` positions. */
  missing(sequence: string, positions: number): number {
    return Math.max(0, pagesFor(positions) - this.table(sequence).length);
  }

  /** Makes the table cover `positions` positions; `false`, and nothing is taken, when pages lack. */
  grow(sequence: string, positions: number): boolean {
    const missing = this.missing(sequence, positions);
    if (missing > this.#free.length) return false;
    let table = this.#tables.get(sequence);
    if (!table) this.#tables.set(sequence, table = []);
    for (let i = 0; i < missing; i++) {
      const page = this.#free.pop()!;
      invariant(
        this.#owner[page] === NOBODY && this.#pins[page] === 0,
        `page ${page} was in the free list while in use`,
      );
      this.#owner[page] = sequence;
      table.push(page);
    }
    return true;
  }

  /** Takes all pages from `sequence`; those that unfinished steps name become free with the last one. */
  release(sequence: string): void {
    for (const page of this.table(sequence)) {
      invariant(this.#owner[page] === sequence, `page ${page} is not ${sequence}'s`);
      this.#owner[page] = NOBODY;
      if (this.#pins[page] === 0) this.#free.push(page);
      else this.#leaving++;
    }
    this.#tables.delete(sequence);
  }

  /** Step number `step` names these pages. May be called several times for one step. */
  pin(step: number, pages: Iterable<number>): void {
    const pinned = this.#pinnedBy.get(step) ?? [];
    for (const page of pages) {
      invariant(this.#owner[page] !== NOBODY, `step ${step} names page ${page}, which is nobody's`);
      this.#pins[page]++;
      pinned.push(page);
    }
    this.#pinnedBy.set(step, pinned);
  }

  /** Step number `step` has finished. */
  unpin(step: number): void {
    const pinned = this.#pinnedBy.get(step);
    invariant(pinned, `step ${step} pins nothing`);
    this.#pinnedBy.delete(step);
    for (const page of pinned) {
      invariant(this.#pins[page] > 0, `page ${page} is pinned less often than unpinned`);
      if (--this.#pins[page] === 0 && this.#owner[page] === NOBODY) {
        this.#free.push(page);
        this.#leaving--;
      }
    }
  }

  /** Counts every page again from scratch: exactly one of owned, leaving and free. For tests. */
  check(): void {
    const free = new Set(this.#free);
    invariant(free.size === this.#free.length, "a page stands in the free list twice");
    const pins = new Uint32Array(this.pages);
    for (const pinned of this.#pinnedBy.values()) for (const page of pinned) pins[page]++;
    const owned = new Map<number, string>();
    for (const [sequence, table] of this.#tables) {
      for (const page of table) {
        invariant(!owned.has(page), `page ${page} stands in two tables`);
        owned.set(page, sequence);
      }
    }
    let leaving = 0;
    for (let page = 0; page < this.pages; page++) {
      invariant(pins[page] === this.#pins[page], `page ${page} has a wrong pin count`);
      invariant((owned.get(page) ?? NOBODY) === this.#owner[page], `page ${page} has two owners`);
      const idle = this.#owner[page] === NOBODY && pins[page] === 0;
      invariant(free.has(page) === idle, `page ${page} is lost or free while in use`);
      if (this.#owner[page] === NOBODY && pins[page] > 0) leaving++;
    }
    invariant(leaving === this.#leaving, "pages on their way out are miscounted");
  }
}
