/**
 * API keys: held as digests, compared in constant time.
 *
 * @module
 */
import { createHash, timingSafeEqual } from "node:crypto";
import type { MiddlewareHandler } from "hono";
import { FleetError } from "../../shared/errors.ts";

const digest = (text: string) => createHash("sha256").update(text, "utf8").digest();

/**
 * Lets a request pass that carries one of `keys` as `Authorization: Bearer KEY`; all of them when
 * there are no keys. Every key is compared, whichever fits, so that time tells nothing.
 *
 * @throws FleetError `unauthorized` (from the handler)
 */
export function requireKey(keys: readonly string[]): MiddlewareHandler {
  const digests = keys.map(digest);
  return async (context, next) => {
    if (digests.length > 0) {
      const header = context.req.header("authorization");
      const given = /^Bearer\s+(.+)$/i.exec(header ?? "")?.[1]?.trim();
      if (given === undefined) {
        throw new FleetError(
          "unauthorized",
          "An API key is missing: send the header Authorization: Bearer KEY",
        );
      }
      const candidate = digest(given);
      let known = false;
      for (const each of digests) known = timingSafeEqual(each, candidate) || known;
      if (!known) throw new FleetError("unauthorized", "The API key is not one of this fleet's");
    }
    await next();
  };
}
