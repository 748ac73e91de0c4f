/**
 * Chat templates: Jinja source from a checkpoint, rendered as the `transformers` library does
 * (`trim_blocks`, `lstrip_blocks`, `raise_exception`, `strftime_now`).
 *
 * @module
 */
import { Environment, Interpreter, Template } from "@huggingface/jinja";
import type { Clock } from "./clock.ts";
import { FleetError } from "./errors.ts";

/** What a template is rendered with. */
export interface ChatArgs {
  messages: readonly object[];
  /** End with the opening of the assistant's turn. */
  add_generation_prompt: boolean;
  tools?: readonly object[];
  /** Whatever else the template knows (`date_string`, `tools_in_user_message`, ...). */
  [name: string]: unknown;
}

/** A parsed template. */
export interface ChatTemplate {
  /**
   * The prompt, special tokens included (so nothing is to be added when it is tokenized).
   *
   * @throws FleetError `bad-request` when the template refuses the messages, or stumbles over them
   */
  render(args: ChatArgs): string;
}

/**
 * Parses a template.
 *
 * @param source Jinja
 * @param options texts of the special tokens, and the clock that `strftime_now` shows (in UTC, so
 *   that a prompt does not depend on where its coordinator stands)
 * @throws FleetError `bad-checkpoint` when the template does not parse
 *
 * @example
 * ```ts
 * import { createChatTemplate } from "./chat_template.ts";
 * import { systemClock } from "./clock.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const template = createChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", {
 *   bosToken: "",
 *   eosToken: "",
 *   clock: systemClock,
 * });
 * const messages = [{ role: "user", content: "Hi" }];
 * assertEquals(template.render({ messages, add_generation_prompt: true }), "user: Hi");
 * ```
 */
export function createChatTemplate(
  source: string,
  options: { bosToken: string; eosToken: string; clock: Clock },
): ChatTemplate {
  let program: Template["parsed"];
  try {
    program = new Template(source).parsed;
    filtersToCalls(program);
  } catch (cause) {
    throw new FleetError("bad-checkpoint", `The chat template does not parse: ${why(cause)}`, {
      cause,
    });
  }
  return {
    render(args) {
      const environment = new Environment();
      const variables = {
        ...globals(environment, options.clock),
        bos_token: options.bosToken,
        eos_token: options.eosToken,
        ...args,
      };
      try {
        for (const [name, value] of Object.entries(variables)) {
          if (value !== undefined) environment.set(name, withoutUndefined(value));
        }
        return String(new Interpreter(environment).run(program).value);
      } catch (cause) {
        if (cause instanceof FleetError) throw cause;
        throw new FleetError(
          "bad-request",
          `The model's chat template cannot render these messages: ${why(cause)}`,
          { cause, param: "messages" },
        );
      }
    },
  };
}

function why(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** A key that is there with `undefined` in it would count as defined in the template. */
function withoutUndefined(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutUndefined);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([, item]) => item !== undefined)
      .map(([key, item]) => [key, withoutUndefined(item)]),
  );
}

function globals(environment: Environment, clock: Clock): Record<string, unknown> {
  return {
    true: true,
    True: true,
    false: false,
    False: false,
    none: null,
    None: null,
    raise_exception(message: unknown) {
      throw new FleetError("bad-request", String(message), { param: "messages" });
    },
    strftime_now: (format: string) => strftime(new Date(clock.unixMs()), format),
    range,
    [FILTERS.select]: listFilter(environment, true),
    [FILTERS.reject]: listFilter(environment, false),
  };
}

/** Python's. */
function range(start: number, stop?: number, step = 1): number[] {
  const [from, to] = stop === undefined ? [0, start] : [start, stop];
  if (step === 0) throw new Error("range() step must not be zero");
  return Array.from(
    { length: Math.max(0, Math.ceil((to - from) / step)) },
    (_, i) => from + i * step,
  );
}

// ── The filters `select` and `reject`, which the library lacks ──────────────────────────────────
// Llama 3.1's template says `builtin_tools | reject('equalto', 'code_interpreter')`. The library's
// filters are a closed list, but its functions are not: `x | reject(a)` is parsed, then turned into
// the call `reject(x, a)` of a function under a name that no template can spell.

const FILTERS: Record<string, string> = { select: "filter select", reject: "filter reject" };

interface Node {
  type: string;
  value?: unknown;
  callee?: Node;
  args?: unknown[];
  operand?: Node;
  filter?: Node;
}

/** Turns every `x | reject(...)` below a node into a call, in place. */
function filtersToCalls(node: unknown): void {
  if (typeof node !== "object" || node === null) return;
  const children = node instanceof Map ? [...node].flat() : Object.values(node);
  for (const child of children) filtersToCalls(child);
  const { type, operand, filter } = node as Node;
  if (type !== "FilterExpression" || !filter) return;
  const callee = filter.type === "CallExpression" ? filter.callee! : filter;
  if (!Object.hasOwn(FILTERS, String(callee.value))) return;
  callee.value = FILTERS[String(callee.value)];
  const args = filter === callee ? [operand] : [operand, ...filter.args!];
  Object.assign(node, { type: "CallExpression", callee, args });
}

type RuntimeValue = ReturnType<Environment["set"]>;

/** Keeps the items that pass (or fail) one of the library's tests; without a name, truthiness. */
function listFilter(environment: Environment, keep: boolean) {
  return (items: unknown, testName?: string, ...args: unknown[]) => {
    if (!Array.isArray(items)) throw new Error("select and reject take a list");
    const test = testName === undefined
      ? (item: RuntimeValue) => item.__bool__().value
      : environment.tests.get(testName);
    if (!test) throw new Error(`Unknown test: ${testName}`);
    // A function gets the bare values of its arguments; tests take them wrapped.
    const wrapped = args.map((value) => ({ value }) as RuntimeValue);
    return (items as RuntimeValue[]).filter((item) => test(item, ...wrapped) === keep).map(bare);
  };
}

/** A runtime value as plain JavaScript. */
function bare(item: RuntimeValue): unknown {
  const value: unknown = item.value;
  if (Array.isArray(value)) return value.map(bare);
  if (!(value instanceof Map)) return value;
  return Object.fromEntries([...value].map(([key, inner]) => [key, bare(inner)]));
}

// ── Dates ───────────────────────────────────────────────────────────────────────────────────────

const MONTHS = [
  "January",
  "February",
  "March",
  "April",
  "May",
  "June",
  "July",
  "August",
  "September",
  "October",
  "November",
  "December",
];
const DAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/** Python's `strftime` in the C locale and in UTC; an unknown directive stays as it is. */
function strftime(date: Date, format: string): string {
  const two = (value: number) => String(value).padStart(2, "0");
  return format.replace(/%[a-zA-Z%]/g, (directive) => {
    switch (directive) {
      case "%Y":
        return String(date.getUTCFullYear());
      case "%y":
        return two(date.getUTCFullYear() % 100);
      case "%m":
        return two(date.getUTCMonth() + 1);
      case "%d":
        return two(date.getUTCDate());
      case "%B":
        return MONTHS[date.getUTCMonth()];
      case "%b":
        return MONTHS[date.getUTCMonth()].slice(0, 3);
      case "%A":
        return DAYS[date.getUTCDay()];
      case "%a":
        return DAYS[date.getUTCDay()].slice(0, 3);
      case "%H":
        return two(date.getUTCHours());
      case "%I":
        return two(date.getUTCHours() % 12 || 12);
      case "%p":
        return date.getUTCHours() < 12 ? "AM" : "PM";
      case "%M":
        return two(date.getUTCMinutes());
      case "%S":
        return two(date.getUTCSeconds());
      case "%%":
        return "%";
      default:
        return directive;
    }
  });
}
