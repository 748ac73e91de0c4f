/**
 * Ports of loopback, for processes that are started together.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";

/**
 * A port of loopback that nobody had a moment ago; any, when none is asked for.
 *
 * @throws FleetError `bad-usage` when somebody has the one that is asked for
 */
export function freePort(asked = 0): number {
  try {
    const listener = Deno.listen({ hostname: "127.0.0.1", port: asked });
    const { port } = listener.addr;
    listener.close();
    return port;
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new FleetError("bad-usage", `Port ${asked} cannot be had (${why}); take another --port`, {
      cause,
    });
  }
}

/** Whether somebody listens on a port of loopback. */
export async function listens(port: number): Promise<boolean> {
  try {
    (await Deno.connect({ hostname: "127.0.0.1", port })).close();
    return true;
  } catch {
    return false;
  }
}
