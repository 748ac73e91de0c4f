/**
 * NATS' subject syntax: tokens between dots; in patterns `*` stands for one token and `>` for one or
 * more at the end.
 *
 * @module
 */

/**
 * Whether `subject` falls under `pattern`.
 *
 * @example
 * ```ts
 * import { subjectMatches } from "./subject.ts";
 * import { assert } from "@std/assert";
 *
 * assert(subjectMatches("fleet.step.a.>", "fleet.step.a.b.7"));
 * assert(!subjectMatches("fleet.beat.*", "fleet.beat.a.b"));
 * ```
 */
export function subjectMatches(pattern: string, subject: string): boolean {
  const wanted = pattern.split("."), tokens = subject.split(".");
  for (const [i, token] of wanted.entries()) {
    if (token === ">") return tokens.length > i;
    if (i >= tokens.length || (token !== "*" && token !== tokens[i])) return false;
  }
  return wanted.length === tokens.length;
}
