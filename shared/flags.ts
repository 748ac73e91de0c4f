/**
 * Command lines: flags with an environment variable beside each, `--help`, and errors that name the
 * flag.
 *
 * @module
 */
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { FleetError } from "./errors.ts";

interface FlagBase {
  help: string;
  /** The environment variable that is read where the flag is absent. */
  env?: string;
}

/** One flag of a command. */
export type Flag =
  | FlagBase & { type: "boolean" }
  | FlagBase & { type: "string"; default?: string; required?: boolean }
  /** What is given counts from where the task was called, a default from where it runs. */
  | FlagBase & { type: "path"; default?: string; required?: boolean }
  | FlagBase & {
    /** `bytes` takes the units KiB, MiB, GiB and TiB ("22GiB"). */
    type: "integer" | "number" | "bytes";
    default?: number;
    min?: number;
    max?: number;
    required?: boolean;
  };

/** A command as `--help` shows it. */
export interface Command<F extends Record<string, Flag>> {
  command: string;
  summary: string;
  flags: F;
  positionals?: { name: string; help: string; optional?: boolean };
}

type Sure = { required: true } | { default: string | number };
type Value<F extends Flag> = F["type"] extends "boolean" ? boolean
  : F["type"] extends "string" | "path" ? (F extends Sure ? string : string | undefined)
  : (F extends Sure ? number : number | undefined);

/** What a command line said. */
export interface ParsedFlags<F extends Record<string, Flag>> {
  values: { [K in keyof F]: Value<F[K]> };
  positionals: string[];
}

const UNITS: Record<string, number> = {
  "": 1,
  B: 1,
  KiB: 2 ** 10,
  MiB: 2 ** 20,
  GiB: 2 ** 30,
  TiB: 2 ** 40,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
};

/**
 * Parses a command line; prints the help and exits with 0 when asked to.
 *
 * @param command what the command takes
 * @param args usually `Deno.args`
 * @param env reads an environment variable
 * @throws FleetError `bad-usage` that names the flag and what it takes
 *
 * @example
 * ```ts
 * import { parseFlags } from "./flags.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const { values } = parseFlags({
 *   command: "worker",
 *   summary: "Joins a fleet.",
 *   flags: { memory: { type: "bytes", help: "GPU memory to use" } },
 * }, ["--memory", "22GiB"], () => undefined);
 * assertEquals(values.memory, 22 * 2 ** 30);
 * ```
 */
export function parseFlags<const F extends Record<string, Flag>>(
  command: Command<F>,
  args: string[] = Deno.args,
  env: (name: string) => string | undefined = (name) => Deno.env.get(name),
): ParsedFlags<F> {
  if (args.includes("--help") || args.includes("-h")) {
    console.log(helpText(command));
    Deno.exit(0);
  }
  const options: Record<string, { type: "boolean" | "string" }> = {};
  for (const [name, flag] of Object.entries(command.flags)) {
    options[name] = { type: flag.type === "boolean" ? "boolean" : "string" };
  }
  let parsed: { values: Record<string, unknown>; positionals: string[] };
  try {
    parsed = parseArgs({ args, options, allowPositionals: command.positionals !== undefined });
  } catch (cause) {
    throw usage(command, cause instanceof Error ? cause.message : String(cause));
  }
  const values: Record<string, unknown> = {};
  for (const [name, flag] of Object.entries(command.flags)) {
    const given = parsed.values[name] ?? (flag.env ? env(flag.env) || undefined : undefined);
    const value = flagValue(command, name, flag, given as string | boolean | undefined);
    values[name] = flag.type === "path" && given !== undefined
      ? resolve(env("INIT_CWD") ?? ".", String(given))
      : value;
  }
  if (command.positionals && !command.positionals.optional && parsed.positionals.length === 0) {
    throw usage(command, `${command.positionals.name} is missing`);
  }
  return { values: values as ParsedFlags<F>["values"], positionals: parsed.positionals };
}

function flagValue<F extends Record<string, Flag>>(
  command: Command<F>,
  name: string,
  flag: Flag,
  given: string | boolean | undefined,
): string | number | boolean | undefined {
  if (flag.type === "boolean") return given === true || given === "1" || given === "true";
  if (given === undefined) {
    if (flag.default !== undefined) return flag.default;
    if (flag.required) {
      throw usage(command, `--${name} is missing${flag.env ? ` (or ${flag.env})` : ""}`);
    }
    return undefined;
  }
  const text = String(given);
  if (flag.type === "string" || flag.type === "path") return text;
  const [, digits, unit] = /^(-?[\d.]+)\s*([A-Za-z]*)$/.exec(text) ?? [];
  const scale = flag.type === "bytes" ? UNITS[unit ?? ""] : unit === "" ? 1 : undefined;
  const value = Number(digits) * (scale ?? NaN);
  if (!Number.isFinite(value) || (flag.type === "integer" && !Number.isInteger(value))) {
    const takes = flag.type === "bytes"
      ? "a size such as 22GiB"
      : `a${flag.type === "integer" ? "n integer" : " number"}`;
    throw usage(command, `--${name} takes ${takes}, not ${JSON.stringify(text)}`);
  }
  if (value < (flag.min ?? -Infinity) || value > (flag.max ?? Infinity)) {
    throw usage(
      command,
      `--${name} takes ${flag.min ?? "any"} to ${flag.max ?? "any"}, not ${text}`,
    );
  }
  return flag.type === "bytes" ? Math.floor(value) : value;
}

function usage<F extends Record<string, Flag>>(command: Command<F>, what: string): FleetError {
  return new FleetError("bad-usage", `${what}; see deno task ${command.command} --help`);
}

/** Sizes as they are written on a command line. */
function shownDefault(flag: Exclude<Flag, { type: "boolean" }>): string {
  const { type, default: value } = flag;
  if (type !== "bytes" || value === undefined) return String(value);
  const unit = ["TiB", "GiB", "MiB", "KiB"].find((unit) => value > 0 && value % UNITS[unit] === 0);
  return unit ? `${value / UNITS[unit]}${unit}` : String(value);
}

/** The text that `--help` prints. */
export function helpText<F extends Record<string, Flag>>(command: Command<F>): string {
  const positional = command.positionals;
  const shown = positional
    ? (positional.optional ? ` [${positional.name}]` : ` ${positional.name}`)
    : "";
  const lines = [`Usage: deno task ${command.command}${shown} [flags]`, "", command.summary, ""];
  if (positional) lines.push(`  ${positional.name}  ${positional.help}`, "");
  const heads = Object.entries(command.flags).map(([name, flag]) =>
    `  --${name}${flag.type === "boolean" ? "" : ` <${flag.type}>`}`
  );
  const width = Math.max(...heads.map((head) => head.length), 8) + 2;
  for (const [index, flag] of Object.values(command.flags).entries()) {
    const notes = [
      flag.type === "boolean" || (flag.default ?? "") === "" ? "" : `default ${shownDefault(flag)}`,
      flag.env ?? "",
    ].filter(Boolean).join(", ");
    lines.push(`${heads[index].padEnd(width)}${flag.help}${notes ? ` [${notes}]` : ""}`);
  }
  lines.push(`${"  --help".padEnd(width)}this text`);
  return lines.join("\n");
}

/**
 * Runs a command's `main`: a FleetError becomes one line on standard error and exit status 1 (2 for
 * wrong usage); any other error keeps its stack, for it is a defect.
 */
export async function runCommand(main: () => Promise<void>): Promise<void> {
  try {
    await main();
  } catch (error) {
    if (!(error instanceof FleetError)) throw error;
    console.error(`error: ${error.message}`);
    Deno.exit(error.code === "bad-usage" ? 2 : 1);
  }
}
