import { assert, assertEquals, assertLess, assertStringIncludes, assertThrows } from "@std/assert";
import { FleetError } from "./errors.ts";
import { randomInt, seededRandom } from "./random.ts";
import { createTokenizer } from "./tokenizer.ts";

const llama3 = readOptional("../../shared/tokenizer/llama3-tokenizer.json");
const vectors = readOptional("../../shared/tokenizer/llama3-vectors.json");

function readOptional(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(new URL(path, import.meta.url));
  } catch {
    return undefined;
  }
}

/** A byte-level vocabulary of single bytes and a few merges; ids of bytes are shuffled. */
function byteLevelJson(): string {
  const chars: string[] = [];
  for (let byte = 0, others = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte !== 0xad);
    chars.push(String.fromCharCode(printable ? byte : 0x100 + others++));
  }
  const vocab: Record<string, number> = {};
  for (const [byte, char] of chars.entries()) vocab[char] = (byte * 7) % 256;
  const merges = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], [chars[0xf0], chars[0x9f]]];
  for (const [index, pair] of merges.entries()) vocab[pair.join("")] = 256 + index;
  return JSON.stringify({
    added_tokens: [
      { id: 261, content: "<s>", special: true, normalized: false },
      { id: 262, content: "<tool>", special: false, normalized: false },
    ],
    normalizer: null,
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, use_regex: true },
    post_processor: {
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
      pair: [],
      special_tokens: { "<s>": { id: "<s>", ids: [261], tokens: ["<s>"] } },
    },
    decoder: { type: "ByteLevel" },
    model: { type: "BPE", vocab, merges, unk_token: null },
  });
}

const CONFIG = JSON.stringify({ bos_token: "<s>", eos_token: { content: "</s>" } });
const TEXTS = [
  "hello world",
  "Füße, 漢字, 🦙🦙 and 👩‍👩‍👧‍👦\r\n\t",
  "\u0000\u0001\u007f\u00ad\ufeff",
  "",
  " \n  ",
];

Deno.test("encode() and decode() are inverse, BOS only where asked for", () => {
  const tokenizer = createTokenizer(byteLevelJson(), CONFIG);
  for (const text of TEXTS) {
    const ids = tokenizer.encode(text);
    assert(!ids.includes(261));
    assertEquals(tokenizer.decode(ids), text);
    assertEquals([...tokenizer.encode(text, { addSpecialTokens: true })], [261, ...ids]);
  }
  assertEquals([...tokenizer.encode("hello")], [259]);
  assertEquals(
    [tokenizer.bosToken, tokenizer.bosText, tokenizer.eosText, tokenizer.vocabSize],
    [261, "<s>", "</s>", 263],
  );
});

Deno.test("special tokens in the text are recognized, and left out of the answer unless asked for", () => {
  const tokenizer = createTokenizer(byteLevelJson(), CONFIG);
  const ids = tokenizer.encode("<s>hello<tool>");
  assertEquals([...ids], [261, 259, 262]);
  assertEquals(tokenizer.decode(ids), "hello<tool>");
  assertEquals(tokenizer.decode(ids, { skipSpecialTokens: false }), "<s>hello<tool>");
  assertEquals(tokenizer.tokenText(261), "<s>");
});

Deno.test("a stream never breaks a character, and says in the end what decode() says", () => {
  const tokenizer = createTokenizer(byteLevelJson(), CONFIG);
  const random = seededRandom(1);
  const cases = [...TEXTS.map((text) => [...tokenizer.encode(text)])];
  for (let i = 0; i < 200; i++) {
    cases.push(Array.from({ length: randomInt(random, 40) }, () => randomInt(random, 266)));
  }
  for (const ids of cases) {
    const stream = tokenizer.stream();
    const pieces = [...ids.map((id) => stream.push(id)), stream.end()];
    assertEquals(pieces.join(""), tokenizer.decode(ids));
    for (const piece of pieces) assert(piece.isWellFormed());
    const bytes = ids.filter((id) => id !== 261).flatMap((id) => [...tokenizer.tokenBytes(id)]);
    assertEquals(
      pieces.join(""),
      new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes)),
    );
  }
});

Deno.test("an emoji of several tokens comes out whole, with the last of them", () => {
  const tokenizer = createTokenizer(byteLevelJson(), CONFIG);
  const stream = tokenizer.stream();
  const pieces = [...tokenizer.encode("🦙!")].map((id) => stream.push(id));
  assertEquals(pieces, ["", "", "🦙", "!"]);
  const cut = tokenizer.stream();
  assertEquals(cut.push(tokenizer.encode("🦙")[0]), "");
  assertEquals(cut.end(), "\ufffd");
});

Deno.test("ids that stand for no token are empty", () => {
  const tokenizer = createTokenizer(byteLevelJson(), CONFIG);
  assertEquals(tokenizer.decode([259, 100_000, 4e9]), "hello");
  assertEquals(tokenizer.tokenBytes(100_000), new Uint8Array());
});

Deno.test("lone surrogates and noncharacters encode without an error", () => {
  const tokenizer = createTokenizer(byteLevelJson(), CONFIG);
  assertEquals(tokenizer.decode(tokenizer.encode("a\ud83eb\udd99")), "a\ufffdb\ufffd");
  assertEquals(tokenizer.decode(tokenizer.encode("\uffff\u{10ffff}")), "\uffff\u{10ffff}");
});

Deno.test("a text far beyond the bound is refused without being encoded to its end", () => {
  const tokenizer = createTokenizer(byteLevelJson(), CONFIG);
  const endless = "xyz".repeat(1_500_000);
  const start = performance.now();
  const error = assertThrows(
    () => tokenizer.encode(endless, { maxTokens: 100 }),
    FleetError,
    "more than 100 tokens",
  );
  assertEquals(error.code, "too-large");
  // Encoding it all takes a minute or so.
  assertLess(performance.now() - start, 2000);
  assertEquals(tokenizer.encode("hello".repeat(3000), { maxTokens: 3000 }).length, 3000);
});

Deno.test("a byte-fallback vocabulary (Llama 2's kind) decodes by bytes too", () => {
  const vocab: Record<string, number> = { "<unk>": 0, "▁": 1, "▁a": 2, "a": 3, "b": 4 };
  for (let byte = 0; byte < 256; byte++) {
    vocab[`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`] = 5 + byte;
  }
  const tokenizer = createTokenizer(JSON.stringify({
    added_tokens: [],
    normalizer: {
      type: "Sequence",
      normalizers: [
        { type: "Prepend", prepend: "▁" },
        { type: "Replace", pattern: { String: " " }, content: "▁" },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: "▁" }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    },
    model: {
      type: "BPE",
      vocab,
      merges: [["▁", "a"]],
      unk_token: "<unk>",
      byte_fallback: true,
      fuse_unk: true,
    },
  }));
  const ids = tokenizer.encode("ab 🦙");
  assertEquals(tokenizer.decode(ids), " ab 🦙");
  const stream = tokenizer.stream();
  assertEquals([...ids].map((id) => stream.push(id)), [" a", "b", " ", "", "", "", "🦙"]);
  assertEquals(tokenizer.bosToken, null);
});

Deno.test("what cannot be a tokenizer is a bad checkpoint, in words", () => {
  for (
    const [json, words] of [
      ["{", "tokenizer.json is not JSON"],
      ["{}", "tokenizer.json"],
      [
        byteLevelJson().replace('"decoder":{"type":"ByteLevel"}', '"decoder":{"type":"CTC"}'),
        "CTC",
      ],
    ]
  ) {
    const error = assertThrows(() => createTokenizer(json, CONFIG), FleetError);
    assertEquals(error.code, "bad-checkpoint");
    assertStringIncludes(error.message, words);
  }
});

Deno.test({
  name: "Llama 3's tokenizer gives every vector's ids, and streams them back (needs ../shared)",
  ignore: llama3 === undefined || vectors === undefined,
  fn() {
    const tokenizer = createTokenizer(llama3!, undefined);
    for (const { text, ids } of JSON.parse(vectors!).vectors) {
      assertEquals([...tokenizer.encode(text)], ids, JSON.stringify(text));
      const stream = tokenizer.stream({ skipSpecialTokens: false });
      const pieces = ids.map((id: number) => stream.push(id));
      assertEquals(pieces.join("") + stream.end(), text);
    }
    assertEquals(tokenizer.encode("x", { addSpecialTokens: true })[0], 128000);
    assertEquals(tokenizer.vocabSize, 128256);
    const prose = "It was a dark and stormy night; 漢字 rained in 1842 torrents. ".repeat(16_000);
    const start = performance.now();
    assertEquals(tokenizer.decode(tokenizer.encode(prose)), prose);
    // About 0.7 s for this MB; quadratic behaviour would take minutes.
    assertLess(performance.now() - start, 15_000);
  },
});
