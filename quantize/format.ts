/**
 * Formats as people write them: `m1v4g128`.
 *
 * @module
 */
import { parseFormatName } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { type CodeGemmFormat, ROW_SCALE } from "../shared/model_config.ts";

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
  const format = parseFormatName(name);
  if (format && format.b !== 8) {
    throw new FleetError(
      "bad-usage",
      `--format ${name}: the quantizer makes codes of 8 bits only; those of ${format.b} bits come ` +
        "from AQLM, by deno task convert",
    );
  }
  if (!format || format.g === ROW_SCALE) {
    throw new FleetError(
      "bad-usage",
      `--format takes mXvYgZ (codebooks, weights per code, weights per scale), such as m1v4g128, ` +
        `not ${JSON.stringify(name)}`,
    );
  }
  if (format.g % format.v !== 0) {
    throw new FleetError("bad-usage", `--format ${name}: g must be a multiple of v`);
  }
  return format;
}
