/**
 * What the completion routes accept, checked once at the door.
 *
 * Three kinds of fields: those we honour; those that cannot change the answer, accepted and ignored;
 * and those that would change it and are not supported, refused by name. A name we do not know is of
 * the third kind. `null` means absent, as OpenAI's clients send it.
 *
 * @module
 */
import { z } from "zod";
import { FleetError } from "../../shared/errors.ts";
import { LIMITS } from "../../shared/limits.ts";

const TWO_TO_63 = 2 ** 63;

const stopString = z.string("must be a string").min(1, "must not be empty").refine(
  (text) => new TextEncoder().encode(text).length <= LIMITS.maxStopStringBytes,
  `must be at most ${LIMITS.maxStopStringBytes} bytes`,
);

const number = (min: number, max: number) =>
  z.number(`must be a number from ${min} to ${max}`)
    .min(min, `must be from ${min} to ${max}`).max(max, `must be from ${min} to ${max}`);

const integer = (min: number, max: number) =>
  z.int(`must be an integer from ${min} to ${max}`)
    .min(min, `must be from ${min} to ${max}`).max(max, `must be from ${min} to ${max}`);

const boolean = z.boolean("must be true or false");

/** A field whose only values are those that ask for what we do anyway. */
const only = (allowed: readonly unknown[], message: string) =>
  z.unknown().refine((value) => allowed.includes(value), message).optional();

const emptyList = (what: string) =>
  z.array(z.unknown(), "must be an array").max(0, `${what} are not supported`).optional();

const logitBias = z.record(
  z.string().regex(/^\d{1,10}$/, "must be token ids"),
  number(-100, 100),
  "must map token ids to numbers",
).refine(
  (bias) => Object.keys(bias).length <= LIMITS.maxBiasEntries,
  `must have at most ${LIMITS.maxBiasEntries} entries`,
);

const ignored = z.unknown().optional();

/** Fields of both routes. */
const shared = {
  model: z.string("must be the name of a model (see GET /v1/models)"),
  stream: boolean.optional(),
  stream_options: z.strictObject(
    { include_usage: boolean.optional(), include_obfuscation: ignored },
    "must be an object",
  ).optional(),
  n: integer(1, LIMITS.maxChoices).optional(),
  seed: z.number("must be an integer").refine(
    (seed) => Number.isInteger(seed) && Math.abs(seed) <= TWO_TO_63,
    "must be an integer of at most 64 bits",
  ).optional(),
  temperature: number(0, 2).optional(),
  top_p: number(0, 1).optional(),
  /** An extension: the number of likeliest tokens that may be drawn; 0 or -1 is off. */
  top_k: integer(-1, 2 ** 31 - 1).optional(),
  presence_penalty: number(-2, 2).optional(),
  frequency_penalty: number(-2, 2).optional(),
  logit_bias: logitBias.optional(),
  stop: z.union(
    [
      stopString.transform((text) => [text]),
      z.array(stopString).max(LIMITS.maxStopStrings),
    ],
    `must be a string or up to ${LIMITS.maxStopStrings} strings, each of 1 to ` +
      `${LIMITS.maxStopStringBytes} bytes`,
  ).optional(),
  max_tokens: integer(1, 2 ** 31 - 1).optional(),
  // Accepted: they cannot change the answer.
  user: ignored,
  metadata: ignored,
  store: ignored,
  service_tier: ignored,
  safety_identifier: ignored,
  prompt_cache_key: ignored,
  prompt_cache_retention: ignored,
};

const contentPart = z.strictObject({ type: z.literal("text"), text: z.string() });

const content = z.union([
  z.string(),
  z.array(contentPart).min(1),
], "must be a string or text parts ({type: 'text', text}); other parts are not supported")
  // Parts are paragraphs of one message.
  .transform((value) =>
    typeof value === "string" ? value : value.map((part) => part.text).join("\n")
  );

const message = z.strictObject({
  role: z.enum(
    ["system", "developer", "user", "assistant"],
    "must be system, developer, user or assistant; tool messages are not supported",
  ),
  content,
  name: z.string("must be a string").optional(),
  tool_calls: emptyList("tool calls"),
  refusal: only([undefined], "is not supported"),
  audio: only([undefined], "is not supported"),
  annotations: ignored,
});

/** The body of `POST /v1/chat/completions`. */
export const chatRequest = z.strictObject({
  ...shared,
  messages: z.array(message, "must be an array of messages").min(1, "must not be empty"),
  max_completion_tokens: integer(1, 2 ** 31 - 1).optional(),
  logprobs: boolean.optional(),
  top_logprobs: integer(0, LIMITS.maxAlternatives).optional(),
  parallel_tool_calls: ignored,
  prediction: ignored,
  tools: emptyList("tools"),
  functions: emptyList("functions"),
  tool_choice: only([undefined, "none", "auto"], "must be none or auto: tools are not supported"),
  function_call: only([undefined, "none", "auto"], "must be none or auto: no functions here"),
  response_format: z.looseObject(
    { type: z.literal("text", "must be text; other formats are not supported") },
    "must be {type: 'text'}",
  ).optional(),
  modalities: z.array(
    z.literal("text"),
    "must be ['text']; other modalities are not supported",
  ).optional(),
}).refine((body) => body.logprobs === true || body.top_logprobs === undefined, {
  path: ["top_logprobs"],
  message: "needs logprobs: true",
});

const tokenIds = z.array(z.int().min(0).max(2 ** 32 - 1)).min(1);

/** The body of `POST /v1/completions`. */
export const completionRequest = z.strictObject({
  ...shared,
  prompt: z.union(
    [
      z.string().transform((text): (string | number[])[] => [text]),
      z.array(z.string()).min(1).max(LIMITS.maxPromptsPerRequest),
      tokenIds.transform((ids) => [ids]),
      z.array(tokenIds).min(1).max(LIMITS.maxPromptsPerRequest),
    ],
    "must be a string, an array of strings, an array of token ids, or an array of such arrays, of " +
      `at most ${LIMITS.maxPromptsPerRequest} prompts`,
  ),
  logprobs: integer(0, LIMITS.maxAlternatives).optional(),
  echo: only([undefined, false], "is not supported"),
  suffix: only([undefined, ""], "is not supported"),
  best_of: integer(1, LIMITS.maxChoices).optional(),
}).refine((body) => (body.best_of ?? body.n ?? 1) === (body.n ?? 1), {
  path: ["best_of"],
  message: "is not supported (leave it out, or let it equal n)",
});

/** A checked chat request. */
export type ChatRequest = z.output<typeof chatRequest>;
/** A checked completion request. */
export type CompletionRequest = z.output<typeof completionRequest>;
/** What both have in common. */
export type SharedRequest = Pick<ChatRequest, keyof typeof shared>;

/**
 * Checks `body` against `schema`.
 *
 * @throws FleetError `bad-request` whose `param` and message name the field that is to blame
 */
export function parseBody<T extends z.ZodType>(schema: T, body: unknown): z.output<T> {
  const result = schema.safeParse(withoutNulls(body));
  if (result.success) return result.data;
  const [issue] = result.error.issues;
  if (issue.code === "unrecognized_keys") {
    const param = pathText([...issue.path, issue.keys[0]]);
    throw new FleetError("bad-request", `${param} is not supported`, { param });
  }
  const param = pathText(issue.path);
  if (param === "") throw new FleetError("bad-request", "The body must be a JSON object");
  const missing = issue.path.length === 1 && !(issue.path[0] in (body as object));
  const words = missing ? `is required: it ${issue.message}` : issue.message;
  throw new FleetError("bad-request", `${param} ${words}`, { param });
}

/** No field that we read lies deeper than a message's content part; the depth bounds the recursion. */
function withoutNulls(value: unknown, depth = 4): unknown {
  if (typeof value !== "object" || value === null || depth === 0) return value;
  if (Array.isArray(value)) {
    return value.map((each) => typeof each === "object" ? withoutNulls(each, depth - 1) : each);
  }
  const entries = Object.entries(value).filter(([, each]) => each !== null);
  return Object.fromEntries(entries.map(([name, each]) => [name, withoutNulls(each, depth - 1)]));
}

/** `messages[0].content`, as people write it. */
function pathText(path: readonly PropertyKey[]): string {
  return path.map((step, index) =>
    typeof step === "number" ? `[${step}]` : `${index ? "." : ""}${String(step)}`
  ).join("");
}
