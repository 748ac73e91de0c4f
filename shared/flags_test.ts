import { assert, assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { FleetError } from "./errors.ts";
import { helpText, parseFlags } from "./flags.ts";

const COMMAND = {
  command: "try",
  summary: "Tries flags.",
  flags: {
    size: { type: "bytes", env: "TRY_SIZE", min: 1, help: "how much" },
    count: { type: "integer", default: 3, min: 1, max: 8, help: "how many" },
    name: { type: "string", required: true, env: "TRY_NAME", help: "whose" },
    file: { type: "path", default: "models/x", help: "where" },
    room: { type: "bytes", default: 1.5 * 2 ** 30, help: "where to" },
    keep: { type: "string", default: "", help: "which" },
    loud: { type: "boolean", env: "TRY_LOUD", help: "say more" },
  },
} as const;

const parse = (args: string[], env: Record<string, string> = {}) =>
  parseFlags(COMMAND, args, (name) => env[name]).values;

Deno.test("a flag comes before its environment variable, and that before the default", () => {
  assertEquals(parse(["--name", "a"]), {
    size: undefined,
    count: 3,
    name: "a",
    file: "models/x",
    room: 1.5 * 2 ** 30,
    keep: "",
    loud: false,
  });
  const env = { TRY_NAME: "b", TRY_SIZE: "2MiB", TRY_LOUD: "1" };
  assertEquals(parse([], env).name, "b");
  assertEquals(parse(["--name", "a"], env).name, "a");
  assertEquals(parse([], env).size, 2 ** 21);
  assertEquals(parse([], env).loud, true);
});

Deno.test("a path counts from where the task was called", () => {
  const env = { TRY_NAME: "a", INIT_CWD: "/home/me" };
  assertEquals(parse(["--file", "llama"], env).file, "/home/me/llama");
  assertEquals(parse(["--file", "/data/llama"], env).file, "/data/llama");
  assertEquals(parse([], env).file, "models/x");
});

Deno.test("what does not parse is refused in words that name the flag", () => {
  for (
    const [args, words] of [
      [[], "--name is missing (or TRY_NAME)"],
      [["--name", "a", "--count", "9"], "--count takes 1 to 8, not 9"],
      [["--name", "a", "--count", "2.5"], "--count takes an integer"],
      [["--name", "a", "--size", "2 parsecs"], "--size takes a size such as 22GiB"],
      [["--name", "a", "--size", "1.2.3GiB"], "--size takes a size"],
      [["--name", "a", "--other"], "--other"],
      [["--name", "a", "left over"], "left over"],
    ] as const
  ) {
    const error = assertThrows(() => parse([...args]), FleetError, words);
    assertEquals((error as FleetError).code, "bad-usage");
    assertStringIncludes(error.message, "deno task try --help");
  }
});

Deno.test("the help shows every flag with its default and its environment variable", () => {
  const help = helpText(COMMAND);
  assertStringIncludes(help, "--count <integer>  how many [default 3]");
  assertStringIncludes(help, "whose [TRY_NAME]");
  assertStringIncludes(help, "where to [default 1536MiB]");
  assert(help.includes("which\n"), "an empty default goes without saying");
});
