/**
 * A canary: one token through all stages of an idle fleet, to see that tokens come out.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";
import { toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import type { Engine, GenerateRequest, Readiness } from "./engine.ts";

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
    for await (const event of engine.generate(canary(config), over.signal)) {
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

/** The shortest request there is: one token after one token. */
function canary(config: ModelConfig): GenerateRequest {
  return {
    promptTokens: Uint32Array.of(config.bosToken ?? 0),
    maxTokens: 1,
    temperature: 0,
    topP: 1,
    topK: 0,
    seed: 0n,
    choice: 0,
    presencePenalty: 0,
    frequencyPenalty: 0,
    bias: new Map(),
    alternatives: 0,
    stopTokens: [],
  };
}
