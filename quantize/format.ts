/**
 * Formats as people write them: `m1v4g128`.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import type { CodeGemmFormat } from "../shared/model_config.ts";

/**
 * Parses `mXvYgZ`: X codebooks, Y weights per code, Z weights per scale; codes have 8 bits.
 *
 * @throws FleetError `bad-usage`
 *
 * @example
 * ```ts
 * import { parseFormat } from "./format.ts";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(parseFormat("m2v8g128"), { m: 2, v: 8, g: 128, b: 8 });
 * ```
 */
export function parseFormat(name: string): CodeGemmFormat {
  const [m, v, g] = (/^m([1-9]\d{0,3})v([1-9]\d{0,5})g([1-9]\d{0,5})$/.exec(name) ?? []).slice(1)
    .map(Number);
  if (g === undefined) {
    throw new FleetError(
      "bad-usage",
      `--format takes mXvYgZ (codebooks, weights per code, weights per scale), such as m1v4g128, ` +
        `not ${JSON.stringify(name)}`,
    );
  }
  if (g % v !== 0) {
    throw new FleetError("bad-usage", `--format ${name}: g must be a multiple of v`);
  }
  return { m, v, g, b: 8 };
}
