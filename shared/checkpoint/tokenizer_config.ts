/**
 * What `tokenizer_config.json` says beside the tokenizer itself: the texts of the special tokens and
 * the chat template.
 *
 * @module
 */
import { z } from "zod";
import { FleetError } from "../errors.ts";
import { parseJsonObject } from "./source.ts";

const tokenText = z.union([z.string(), z.object({ content: z.string() })]).nullish()
  .transform((token) => typeof token === "string" ? token : token?.content);

const NamedTemplates = z.array(z.object({ name: z.string(), template: z.string() }));

const Schema = z.object({
  bos_token: tokenText,
  eos_token: tokenText,
  chat_template: z.union([z.string(), NamedTemplates]).nullish(),
});

/** The parts of `tokenizer_config.json` that are used. */
export interface TokenizerConfig {
  bosToken?: string;
  eosToken?: string;
  /** Jinja source; of several named ones, `default`. */
  chatTemplate?: string;
}

/**
 * Parses `tokenizer_config.json`.
 *
 * @param jsonText the file, undefined when there is none
 * @throws FleetError `bad-checkpoint`
 */
export function parseTokenizerConfig(jsonText: string | undefined): TokenizerConfig {
  if (jsonText === undefined) return {};
  const name = "tokenizer_config.json";
  const parsed = Schema.safeParse(parseJsonObject(name, jsonText));
  if (!parsed.success) {
    const { path, message } = parsed.error.issues[0];
    throw new FleetError("bad-checkpoint", `${name}: ${path.join(".")}: ${message}`);
  }
  const { bos_token: bosToken, eos_token: eosToken, chat_template: template } = parsed.data;
  const chatTemplate = Array.isArray(template)
    ? template.find((named) => named.name === "default")?.template
    : template;
  return {
    ...(bosToken === undefined ? {} : { bosToken }),
    ...(eosToken === undefined ? {} : { eosToken }),
    ...(chatTemplate ? { chatTemplate } : {}),
  };
}
