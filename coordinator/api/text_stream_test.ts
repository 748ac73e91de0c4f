import { assertEquals } from "@std/assert";
import { seededRandom } from "../../shared/random.ts";
import { type TextDelta, TextStream } from "./text_stream.ts";

/** Tokens are pieces of the UTF-8 bytes of a text; the decoder shows whole characters only. */
function pieces(text: string, lengths: () => number) {
  const bytes = new TextEncoder().encode(text);
  const tokens: Uint8Array[] = [];
  for (let at = 0; at < bytes.length;) {
    const length = lengths();
    tokens.push(bytes.subarray(at, at + length));
    at += length;
  }
  const decoder = new TextDecoder();
  return {
    tokens,
    decoder: {
      push: (token: number) => decoder.decode(tokens[token], { stream: true }),
      end: () => decoder.decode(),
    },
  };
}

function run(text: string, stops: string[], lengths: () => number) {
  const { tokens, decoder } = pieces(text, lengths);
  const stream = new TextStream<number>(decoder, stops);
  const deltas: TextDelta<number>[] = [];
  for (let token = 0; token < tokens.length; token++) {
    deltas.push(stream.push(token, token));
    if (deltas.at(-1)!.stopped) break;
  }
  deltas.push(stream.end());
  return {
    tokens,
    texts: deltas.map((delta) => delta.text),
    text: deltas.map((delta) => delta.text).join(""),
    entries: deltas.flatMap((delta) => delta.entries),
    stopped: deltas.some((delta) => delta.stopped),
  };
}

/** The plain definition: the stop string that is complete first, the longest of equals. */
function cutByDefinition(text: string, stops: string[]): string {
  for (let end = 1; end <= text.length; end++) {
    const found = stops.filter((stop) => text.slice(0, end).endsWith(stop));
    if (found.length > 0) return text.slice(0, end - Math.max(...found.map((s) => s.length)));
  }
  return text;
}

Deno.test("a character is shown only when all its bytes are there", () => {
  const { texts, entries } = run("aé🦊b", [], () => 1);
  assertEquals(texts.filter(Boolean), ["a", "é", "🦊", "b"]);
  assertEquals(entries.map((each) => each.offset), [0, 1, 1, 2, 2, 2, 2, 3]);
});

Deno.test("a stop string across token borders is never shown, nor what follows it", () => {
  const { text, stopped, texts } = run("Hello\n\nUser: more", ["\n\nUser:"], () => 3);
  assertEquals(text, "Hello");
  assertEquals(stopped, true);
  assertEquals(texts.join("|"), "Hel|lo|||");
});

Deno.test("text that only looked like a stop string comes when it is decided, or at the end", () => {
  assertEquals(run("ab STO ST", ["STOP"], () => 1).texts.join("|"), "a|b| ||||STO |||ST");
  assertEquals(run("x", ["xyz"], () => 1).text, "x");
});

Deno.test("tokens behind a stop string are not reported, one that it cuts is", () => {
  const whole = run("one two three", ["two"], () => 2);
  assertEquals(whole.text, "one ");
  assertEquals(whole.entries.map((each) => each.entry), [0, 1]);
  const cut = run("one two", ["wo"], () => 3);
  assertEquals(cut.text, "one t");
  assertEquals(cut.entries.map((each) => each.entry), [0, 1]);
});

Deno.test("any text, any tokens, any stop strings: the text is cut as defined, tokens as well", () => {
  const random = seededRandom(11);
  const alphabet = ["a", "b", "é", "🦊", "ab"];
  const word = (most: number) =>
    Array.from(
      { length: 1 + Math.floor(random() * most) },
      () => alphabet[Math.floor(random() * alphabet.length)],
    ).join("");
  for (let round = 0; round < 3000; round++) {
    const text = word(24);
    const stops = Array.from({ length: Math.floor(random() * 4) }, () => word(5));
    const result = run(text, stops, () => 1 + Math.floor(random() * 4));
    const expected = cutByDefinition(text, stops);
    assertEquals(result.text, expected, JSON.stringify({ text, stops }));
    assertEquals(result.stopped, expected !== text);
    // Tokens whose bytes begin before the cut, in order, each once.
    const shownBytes = new TextEncoder().encode(expected).length;
    let begins = 0;
    const kept = result.tokens.map((token, index) => {
      const entry = { index, begins };
      begins += token.length;
      return entry;
    }).filter((token) => token.begins < shownBytes).map((token) => token.index);
    assertEquals(result.entries.map((each) => each.entry), kept);
  }
});
