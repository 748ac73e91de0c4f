/**
 * How the command line talks to a fleet's API: requests with a key, and failures in words.
 *
 * @module
 */
import { z } from "zod";
import { FleetError, type FleetErrorCode } from "../shared/errors.ts";

/** Flags of every command that talks to the API. */
export const API_FLAGS = {
  "url": {
    type: "string",
    default: "http://127.0.0.1:8000",
    env: "CODEGEMM_URL",
    help: "the coordinator's API",
  },
  "api-key-file": {
    type: "path",
    env: "CODEGEMM_API_KEY_FILE",
    help: "file with the API key (or set CODEGEMM_API_KEY)",
  },
} as const;

/** Where the API is, and the key it asks for. */
export interface ApiAddress {
  url: string;
  key: string | null;
}

/**
 * The address that the flags name.
 *
 * @throws FleetError `bad-usage`, `disk`
 */
export async function apiAddress(
  values: { "url": string; "api-key-file"?: string },
): Promise<ApiAddress> {
  const { url, "api-key-file": file } = values;
  if (!/^https?:\/\//.test(url) || !URL.canParse(url)) {
    throw new FleetError(
      "bad-usage",
      `--url takes an address such as http://host:8000, not ${url}`,
    );
  }
  const key = file ? await readKey(file) : Deno.env.get("CODEGEMM_API_KEY") || null;
  return { url: url.replace(/\/+$/, ""), key };
}

/** The first line with text, as in the coordinator's own file of keys. */
async function readKey(file: string): Promise<string> {
  let text: string;
  try {
    text = await Deno.readTextFile(file);
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new FleetError("disk", `Cannot read the API key: ${why}`, { cause });
  }
  const key = text.split("\n").map((line) => line.trim()).find(Boolean);
  if (key === undefined) throw new FleetError("bad-usage", `${file} holds no API key`);
  return key;
}

const apiError = z.object({
  error: z.object({ message: z.string(), code: z.string().nullish(), param: z.string().nullish() }),
});

/**
 * Sends a request and returns an answer that succeeded.
 *
 * @throws FleetError with the server's own words, or with what stood between us and it
 */
export async function callApi(
  { url, key }: ApiAddress,
  path: string,
  body?: object,
  signal?: AbortSignal,
): Promise<Response> {
  const headers = new Headers();
  if (key !== null) headers.set("authorization", `Bearer ${key}`);
  if (body) headers.set("content-type", "application/json");
  let response: Response;
  try {
    response = await fetch(url + path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (cause) {
    if (signal?.aborted) throw new FleetError("cancelled", "Called off", { cause });
    const why = cause instanceof Error ? cause.message : String(cause);
    const message = `No coordinator answers at ${url} (${why}); is it running, is --url right?`;
    throw new FleetError("unavailable", message, { cause });
  }
  if (response.ok) return response;
  throw errorOf(await response.text(), response.status);
}

/** An error in OpenAI's shape, as a data event or an answer's body; null for anything else. */
export function parseApiError(text: string): FleetError | null {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    return null;
  }
  const parsed = apiError.safeParse(json);
  return parsed.success ? new FleetError("unavailable", parsed.data.error.message) : null;
}

function errorOf(text: string, status: number): FleetError {
  const message = parseApiError(text)?.message ?? `The server answers ${status}; is --url a fleet?`;
  const codes: Record<number, FleetErrorCode> = {
    400: "bad-request",
    401: "unauthorized",
    404: "not-found",
    413: "too-large",
    429: "overloaded",
  };
  const advice = status === 401 ? "; name its file with --api-key-file" : "";
  return new FleetError(codes[status] ?? "unavailable", message + advice);
}
