/**
 * A canary: one token through all stages of an idle fleet, to see that tokens come out.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";
import { toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import { type Engine, PLAIN_REQUEST, type Readiness } from "./engine.ts";

/** Sends one, and waits for it no longer than `LIMITS.readyWithinMs`. */
export async function sendCanary(
  engine: Pick<Engine, "generate">,
  clock: Clock,
  config: ModelConfig,
): Promise<Readiness> {
  const over = new AbortController();
  const timer = clock.after(LIMITS.readyWithinMs, () => over.abort());
  const startMs = clock.nowMs();
  try {
    // The shortest request there is: one token after one token.
    const promptTokens = Uint32Array.of(config.bosToken ?? 0);
    for await (const event of engine.generate({ ...PLAIN_REQUEST, promptTokens }, over.signal)) {
      if (event.type !== "finish") continue;
      const tookMs = Math.round(clock.nowMs() - startMs);
      return { ready: true, reason: `a canary token took ${tookMs} ms` };
    }
    return { ready: false, reason: `a canary token took over ${LIMITS.readyWithinMs} ms` };
  } catch (error) {
    return { ready: false, reason: toFleetError(error).message };
  } finally {
    timer.cancel();
  }
}
