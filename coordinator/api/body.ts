/**
 * A request's body: bounded while it is read, strict UTF-8, JSON.
 *
 * @module
 */
import { HTTPException } from "hono/http-exception";
import { FleetError } from "../../shared/errors.ts";
import { LIMITS } from "../../shared/limits.ts";

/**
 * Reads a JSON body of at most `maxBytes`; a longer one is refused before the rest of it is read.
 *
 * The content type must say JSON. A page of another origin cannot send that type without asking
 * first (a CORS preflight, which we do not answer), so it cannot spend a local fleet's time.
 *
 * @throws HTTPException 413, 415
 * @throws FleetError `bad-request` for bytes that are not UTF-8, or text that is not JSON
 */
export async function readJson(request: Request, maxBytes = LIMITS.maxBodyBytes): Promise<unknown> {
  const type = request.headers.get("content-type") ?? "";
  if (!/^application\/(?:[\w.-]+\+)?json\s*(?:;|$)/i.test(type)) {
    throw new HTTPException(415, {
      message: "The body must be JSON: send the header content-type: application/json",
    });
  }
  const text = decodeUtf8(await readBytes(request, maxBytes));
  try {
    return JSON.parse(text);
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new FleetError("bad-request", `The body is not JSON: ${why}`, { cause });
  }
}

async function readBytes(request: Request, maxBytes: number): Promise<Uint8Array> {
  const tooLong = () =>
    new HTTPException(413, { message: `The body is longer than ${maxBytes} bytes` });
  if (Number(request.headers.get("content-length") ?? 0) > maxBytes) throw tooLong();
  const chunks: Uint8Array[] = [];
  let length = 0;
  for await (const chunk of request.body ?? []) {
    length += chunk.length;
    if (length > maxBytes) throw tooLong();
    chunks.push(chunk);
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new FleetError("bad-request", "The body is not valid UTF-8", { cause });
  }
}
