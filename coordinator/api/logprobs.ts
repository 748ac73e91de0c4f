/**
 * Log-probabilities in the two shapes that OpenAI's routes give them.
 *
 * @module
 */
import type { TextTokenizer } from "../../shared/tokenizer.ts";
import type { TokenLogprob } from "../engine.ts";
import type { DrawnToken } from "./generation.ts";
import type { PlacedEntry } from "./text_stream.ts";

/** JSON has no -Infinity; OpenAI writes this for a token that cannot come. */
const NEVER = -9999;

/** One token in a chat answer's `logprobs.content`. */
export interface ChatLogprob {
  token: string;
  logprob: number;
  /** The token's UTF-8 bytes: a token may be a part of a character. */
  bytes: number[];
  top_logprobs: Omit<ChatLogprob, "top_logprobs">[];
}

/** `logprobs` of a completions choice, and of its chunks. */
export interface CompletionLogprobs {
  tokens: string[];
  token_logprobs: number[];
  top_logprobs: Record<string, number>[];
  /** Where each token's text begins, in code points from the start of the answer. */
  text_offset: number[];
}

/** The chat shape. */
export function chatLogprobs(
  tokenizer: TextTokenizer,
  tokens: readonly PlacedEntry<DrawnToken>[],
): { content: ChatLogprob[]; refusal: null } {
  const one = ({ token, logprob }: TokenLogprob) => {
    const bytes = tokenizer.tokenBytes(token);
    return { token: spelled(bytes, "\\x"), logprob: finite(logprob), bytes: [...bytes] };
  };
  const content = tokens.map(({ entry }) => ({
    ...one(entry),
    top_logprobs: entry.alternatives.map(one),
  }));
  return { content, refusal: null };
}

/** The older shape of the completions route; the drawn token stands among its alternatives. */
export function completionLogprobs(
  tokenizer: TextTokenizer,
  tokens: readonly PlacedEntry<DrawnToken>[],
): CompletionLogprobs {
  const name = (token: number) => spelled(tokenizer.tokenBytes(token), "bytes:\\x");
  return {
    tokens: tokens.map(({ entry }) => name(entry.token)),
    token_logprobs: tokens.map(({ entry }) => finite(entry.logprob)),
    top_logprobs: tokens.map(({ entry }) =>
      Object.fromEntries(
        [...entry.alternatives, entry].map((each) => [name(each.token), finite(each.logprob)]),
      )
    ),
    text_offset: tokens.map(({ offset }) => offset),
  };
}

const finite = (logprob: number) => Math.max(logprob, NEVER);

/** A token as text; one that is no whole characters as its bytes in hexadecimal. */
function spelled(bytes: Uint8Array, prefix: "\\x" | "bytes:\\x"): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0"));
    return prefix + hex.join("\\x");
  }
}
