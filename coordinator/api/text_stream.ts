/**
 * Tokens in, text out: whole characters only, stop strings cut out exactly wherever the borders of
 * tokens fall, and each token's entry released together with its text. Pure.
 *
 * @module
 */

/** Turns tokens into text piece by piece, whole characters only (`TextTokenizer.stream()`). */
export interface TokenDecoder {
  push(token: number): string;
  end(): string;
}

/** What became certain: text that may be shown, and the tokens whose text that completes. */
export interface TextDelta<Entry> {
  text: string;
  entries: PlacedEntry<Entry>[];
  /** A stop string was found; nothing follows. */
  stopped: boolean;
}

/** A token's entry with the place of its text, in code points from the start of the answer. */
export interface PlacedEntry<Entry> {
  entry: Entry;
  offset: number;
}

/**
 * The text of one choice.
 *
 * A stop string ends the text in front of it, the one that is complete first (of several complete at
 * the same character, the longest). Text that may still become a stop string is held back until it is
 * decided. A token belongs to the answer if any of its text does, or if its bytes begin a character
 * that does.
 *
 * @example
 * ```ts
 * import { TextStream } from "./text_stream.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const letters = { push: (token: number) => String.fromCharCode(token), end: () => "" };
 * const stream = new TextStream<null>(letters, ["END"]);
 * const shown = [..."one ENx END two"].map((c) => stream.push(c.charCodeAt(0), null).text);
 * assertEquals(shown.slice(0, 7), ["o", "n", "e", " ", "", "", "ENx"]);
 * ```
 */
export class TextStream<Entry> {
  readonly #decoder: TokenDecoder;
  readonly #stops: readonly string[];
  /** Decoded and not yet shown. */
  #held = "";
  /** UTF-16 length of what was shown. */
  #shown = 0;
  /** Tokens whose text is not all shown, `start` and `end` as UTF-16 offsets. */
  #waiting: { entry: Entry; start: number; end: number; offset: number }[] = [];
  /** Code points decoded so far. */
  #points = 0;
  #stopped = false;

  constructor(decoder: TokenDecoder, stops: readonly string[]) {
    this.#decoder = decoder;
    this.#stops = stops;
  }

  /** Adds a token; what it makes certain comes back. After a stop string: nothing. */
  push(token: number, entry: Entry): TextDelta<Entry> {
    if (this.#stopped) return { text: "", entries: [], stopped: true };
    return this.#append(this.#decoder.push(token), entry);
  }

  /** The end of the answer: whatever was held back. */
  end(): TextDelta<Entry> {
    if (this.#stopped) return { text: "", entries: [], stopped: true };
    const last = this.#append(this.#decoder.end());
    if (last.stopped) return last;
    const rest = this.#show(this.#held.length);
    const entries = this.#waiting.splice(0).map(({ entry, offset }) => ({ entry, offset }));
    return {
      text: last.text + rest.text,
      entries: [...last.entries, ...rest.entries, ...entries],
      stopped: false,
    };
  }

  #append(piece: string, entry?: Entry): TextDelta<Entry> {
    const start = this.#shown + this.#held.length;
    const searched = this.#held.length;
    this.#held += piece;
    if (entry !== undefined) {
      this.#waiting.push({ entry, start, end: start + piece.length, offset: this.#points });
    }
    for (const _ of piece) this.#points++;
    if (piece === "") return { text: "", entries: [], stopped: false };
    const cut = this.#findStop(searched);
    if (cut === null) return this.#show(this.#held.length - this.#undecided());
    this.#stopped = true;
    const cutAt = this.#shown + cut;
    const kept = this.#waiting.splice(0).filter((token) => token.start < cutAt);
    const entries = kept.map(({ entry, offset }) => ({ entry, offset }));
    return { text: this.#show(cut).text, entries, stopped: true };
  }

  /** Shows the first `length` units of the held text, and the tokens that end in it. */
  #show(length: number): TextDelta<Entry> {
    const text = this.#held.slice(0, length);
    this.#held = this.#held.slice(length);
    this.#shown += length;
    if (text === "") return { text, entries: [], stopped: false };
    let count = 0;
    while (count < this.#waiting.length && this.#isShown(this.#waiting[count])) count++;
    const entries = this.#waiting.splice(0, count).map(({ entry, offset }) => ({ entry, offset }));
    return { text, entries, stopped: false };
  }

  /** A token without text of its own (the first bytes of a character) waits for what follows it. */
  #isShown(token: { start: number; end: number }): boolean {
    return token.end === token.start ? token.start < this.#shown : token.end <= this.#shown;
  }

  /** Where the stop string begins that is complete first, or null; one ends beyond `searched`. */
  #findStop(searched: number): number | null {
    let bestStart = -1, bestEnd = Infinity;
    for (const stop of this.#stops) {
      const from = Math.max(0, searched - stop.length + 1);
      const start = this.#held.indexOf(stop, from);
      if (start < 0) continue;
      const end = start + stop.length;
      if (end < bestEnd || (end === bestEnd && start < bestStart)) {
        bestStart = start;
        bestEnd = end;
      }
    }
    return bestStart < 0 ? null : bestStart;
  }

  /** Length of the longest end of the held text with which a stop string begins. */
  #undecided(): number {
    let longest = 0;
    for (const stop of this.#stops) {
      let length = Math.min(stop.length - 1, this.#held.length);
      while (length > longest && !this.#held.endsWith(stop.slice(0, length))) length--;
      longest = Math.max(longest, length);
    }
    return longest;
  }
}
