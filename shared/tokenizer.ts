/**
 * Text to tokens and back: `tokenizer.json` through `@huggingface/tokenizers` for encoding, and our
 * own decoding by bytes, so that a stream never shows half a character.
 *
 * @module
 */
import { Tokenizer } from "@huggingface/tokenizers";
import { parseTokenizerConfig } from "./checkpoint/tokenizer_config.ts";
import { parseJsonObject } from "./checkpoint/source.ts";
import { FleetError } from "./errors.ts";

/** How a text is encoded. */
export interface EncodeOptions {
  /** Add what the tokenizer puts around a text, as a rule BOS in front. Default: false. */
  addSpecialTokens?: boolean;
  /**
   * Refuse texts that are much longer, without encoding them to their end. A text a little longer
   * may pass: count what comes back.
   */
  maxTokens?: number;
}

/** How tokens become text. */
export interface DecodeOptions {
  /** Leave out BOS, EOS and the like. Default: true. */
  skipSpecialTokens?: boolean;
}

/** Turns tokens to text one by one; made for one stream. */
export interface StreamDecoder {
  /** The text that this token completes; empty while a character is incomplete. */
  push(token: number): string;
  /** What is left: U+FFFD when the last character was never completed. */
  end(): string;
}

/** A tokenizer. */
export interface TextTokenizer {
  /**
   * The tokens of a text. Special tokens written out in the text are recognized; lone surrogates
   * count as U+FFFD.
   *
   * @throws FleetError `too-large`, see {@linkcode EncodeOptions.maxTokens}
   */
  encode(text: string, options?: EncodeOptions): Uint32Array<ArrayBuffer>;
  /**
   * The text of tokens: their bytes as UTF-8, with U+FFFD for what is none. Nothing is cleaned up or
   * trimmed, and ids that stand for no token are empty.
   */
  decode(tokens: Iterable<number>, options?: DecodeOptions): string;
  /** Decodes piece by piece: all pushes and the end, joined, are what `decode` gives. */
  stream(options?: DecodeOptions): StreamDecoder;
  /** One token on its own; U+FFFD where it is a part of a character. */
  tokenText(token: number): string;
  /** The bytes of one token; empty for ids that stand for none. */
  tokenBytes(token: number): Uint8Array;
  /** Of `tokenizer_config.json`; null when the model has none. */
  bosToken: number | null;
  /** Texts for the chat template; empty when the model has none. */
  bosText: string;
  eosText: string;
  /** Ids are below this. */
  vocabSize: number;
}

/**
 * Makes a tokenizer from a checkpoint's two files.
 *
 * @param tokenizerJson `tokenizer.json`
 * @param tokenizerConfigJson `tokenizer_config.json`, where there is one
 * @throws FleetError `bad-checkpoint` when they do not parse, or are of a kind we cannot decode
 */
export function createTokenizer(
  tokenizerJson: string,
  tokenizerConfigJson?: string,
): TextTokenizer {
  const json = parseJsonObject("tokenizer.json", tokenizerJson);
  const texts = parseTokenizerConfig(tokenizerConfigJson);
  let library: Tokenizer;
  try {
    // The library's config only steers its own decoding, which we do not use.
    library = new Tokenizer(json, {});
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new FleetError("bad-checkpoint", `tokenizer.json: ${why}`, { cause });
  }
  let vocabSize = 0;
  for (const id of library.get_vocab().values()) vocabSize = Math.max(vocabSize, id + 1);
  const bytesOf = tokenBytesOf(library, json);
  const added = library.get_added_tokens_decoder();
  const special = new Set([...added.values()].filter((token) => token.special).map((t) => t.id));

  const stream = ({ skipSpecialTokens = true }: DecodeOptions = {}): StreamDecoder => {
    // ignoreBOM: or a U+FEFF at the beginning would vanish.
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push: (token) =>
        skipSpecialTokens && special.has(token)
          ? ""
          : decoder.decode(bytesOf(token), { stream: true }),
      end: () => decoder.decode(),
    };
  };
  return {
    encode(text, { addSpecialTokens = false, maxTokens } = {}) {
      const wellFormed = text.toWellFormed();
      const encode = (part: string) =>
        library.encode(part, { add_special_tokens: addSpecialTokens }).ids;
      if (maxTokens !== undefined) refuseLong(wellFormed, maxTokens, encode);
      return Uint32Array.from(encode(wellFormed), (id) => {
        if (id !== undefined) return id;
        throw new FleetError("bad-checkpoint", "tokenizer.json yields a token without an id");
      });
    },
    decode(tokens, options) {
      const decoder = stream(options);
      let text = "";
      for (const token of tokens) text += decoder.push(token);
      return text + decoder.end();
    },
    stream,
    tokenText: (token) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytesOf(token)),
    tokenBytes: bytesOf,
    bosToken: texts.bosToken === undefined ? null : library.token_to_id(texts.bosToken) ?? null,
    bosText: texts.bosToken ?? "",
    eosText: texts.eosToken ?? "",
    vocabSize,
  };
}

/**
 * A prefix may have a few tokens more than it has as a part of the whole, where it cuts a word or a
 * special token in two.
 */
const CUT_TOKENS = 256;

/**
 * Encodes ever longer beginnings of a long text until one is surely too long. The library takes
 * 5 to 9 us per character for the worst texts (one endless word), half a second per MB of prose;
 * so a text over the bound costs about what the longest permitted one does.
 */
function refuseLong(text: string, maxTokens: number, encode: (part: string) => number[]): void {
  for (let chars = 4 * (maxTokens + CUT_TOKENS); chars < text.length; chars *= 2) {
    if (encode(text.slice(0, chars).toWellFormed()).length > maxTokens + CUT_TOKENS) {
      throw new FleetError("too-large", `The text has more than ${maxTokens} tokens`);
    }
  }
}

/** Bytes by token id, for byte-level and byte-fallback vocabularies. */
function tokenBytesOf(
  library: Tokenizer,
  json: Record<string, unknown>,
): (token: number) => Uint8Array {
  const utf8 = new TextEncoder();
  const added = library.get_added_tokens_decoder();
  const steps = decoderSteps(json.decoder);
  const encodePiece = steps.includes("ByteLevel")
    ? (piece: string) => byteLevelBytes(piece) ?? utf8.encode(piece)
    : steps.includes("ByteFallback") || steps.includes("Metaspace")
    ? (piece: string) => fallbackByte(piece) ?? utf8.encode(piece.replaceAll("▁", " "))
    : undefined;
  if (!encodePiece) {
    throw new FleetError(
      "bad-checkpoint",
      `tokenizer.json: its decoder (${steps.join(", ") || "none"}) is not supported; ` +
        "byte-level and byte-fallback vocabularies are",
    );
  }
  const cache = new Map<number, Uint8Array>();
  return (token) => {
    let bytes = cache.get(token);
    if (bytes === undefined) {
      const piece = library.id_to_token(token);
      bytes = piece === undefined
        ? new Uint8Array()
        : added.has(token)
        ? utf8.encode(piece)
        : encodePiece(piece);
      if (piece !== undefined) cache.set(token, bytes);
    }
    return bytes;
  };
}

function decoderSteps(decoder: unknown): string[] {
  const { type, decoders } = (decoder ?? {}) as { type?: unknown; decoders?: unknown };
  if (Array.isArray(decoders)) return decoders.flatMap(decoderSteps);
  return typeof type === "string" ? [type] : [];
}

/**
 * GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the other 68 bytes,
 * in order, for U+0100 and up.
 */
const BYTE_OF_CHAR = new Map<string, number>();
for (let byte = 0, others = 0; byte < 256; byte++) {
  const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte !== 0xad);
  BYTE_OF_CHAR.set(String.fromCharCode(printable ? byte : 0x100 + others++), byte);
}

function byteLevelBytes(piece: string): Uint8Array | undefined {
  const bytes = Uint8Array.from(piece, (char) => BYTE_OF_CHAR.get(char) ?? 0);
  return [...piece].every((char) => BYTE_OF_CHAR.has(char)) ? bytes : undefined;
}

/** `<0x0A>` in the vocabularies of Llama 2 and its kin. */
function fallbackByte(piece: string): Uint8Array | undefined {
  const hex = /^<0x([0-9A-F]{2})>$/.exec(piece)?.[1];
  return hex === undefined ? undefined : Uint8Array.of(parseInt(hex, 16));
}
