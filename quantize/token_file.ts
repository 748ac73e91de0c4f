/**
 * Files of token ids: little-endian uint16 (`.u16`) or uint32 (`.u32`), or JSON with an array
 * `tokens`.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";

/**
 * Reads a file of token ids.
 *
 * @throws FleetError `bad-usage` when it cannot be read, or holds something else
 */
export async function readTokenFile(path: string): Promise<Uint16Array | Uint32Array> {
  const bad = (what: string, cause?: unknown) =>
    new FleetError("bad-usage", `${path}: ${what}`, { cause });
  let bytes: Uint8Array<ArrayBuffer>;
  try {
    bytes = await Deno.readFile(path);
  } catch (cause) {
    throw bad(`cannot be read: ${cause instanceof Error ? cause.message : cause}`, cause);
  }
  const [, ending] = /\.([^./]+)$/.exec(path) ?? [];
  if (ending === "u16" || ending === "u32") {
    const size = ending === "u16" ? 2 : 4;
    if (bytes.length % size !== 0) throw bad(`its ${bytes.length} bytes are no whole ${ending}`);
    return ending === "u16" ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer);
  }
  let tokens: unknown;
  try {
    tokens = JSON.parse(new TextDecoder().decode(bytes)).tokens;
  } catch (cause) {
    throw bad("is neither .u16 nor .u32 nor JSON", cause);
  }
  if (!Array.isArray(tokens) || !tokens.every((token) => Number.isInteger(token) && token >= 0)) {
    throw bad('has no array "tokens" of token ids');
  }
  return Uint32Array.from(tokens);
}
