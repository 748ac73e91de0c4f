import { assertEquals } from "@std/assert";
import type { StepBatch } from "../shared/frames.ts";
import type { StageSteps, Ticket } from "./stage_spec.ts";
import { tinyConfig } from "./testing/random_model.ts";
import { checkBatch } from "./check_batch.ts";
import { warmUp } from "./warm_up.ts";

/** Checks batches as the model does, and counts their rows. */
function recorder(spec: Parameters<typeof warmUp>[1]) {
  const seen: { decode: number; prefill: number; requests: number }[] = [];
  const model: StageSteps = {
    memoryBytes: 0,
    submit(batch: StepBatch, hidden: Uint16Array | null): Ticket {
      checkBatch(spec, batch, hidden);
      const { decodeRows: decode, rowToken, requests } = batch;
      seen.push({ decode, prefill: rowToken.length - decode, requests: requests.length });
      return { id: seen.length };
    },
    prepare() {},
    settle() {},
    busyForMs: () => 0,
    finish: () => Promise.resolve({ hidden: null, results: [], gpuMs: 0, readbackMs: 0 }),
    destroy() {},
  };
  return { model, seen };
}

const LIMITS = { maxRows: 64, maxSequences: 17, maxOutputs: 4, pages: 32, contextTokens: 64 };

Deno.test("warm-up runs every decode batch size and prefill rows, within the stage's limits", async () => {
  const config = tinyConfig({});
  const profile = { version: 1, decode: "codegemm" as const };
  for (const [first, last] of [[true, true], [true, false], [false, false], [false, true]]) {
    const spec = { config, from: 0, to: 1, first, last, profile, limits: LIMITS };
    const { model, seen } = recorder(spec);
    await warmUp(model, spec);
    assertEquals(seen.map(({ decode }) => decode), [1, 2, 4, 8, 16]);
    assertEquals(seen.every(({ prefill }) => prefill === 1), true);
    assertEquals(seen.map(({ requests }) => requests), last ? [2, 3, 4, 4, 4] : [0, 0, 0, 0, 0]);
  }
});

Deno.test("warm-up keeps to the smallest limits there are", async () => {
  const limits = { maxRows: 1, maxSequences: 1, maxOutputs: 1, pages: 1, contextTokens: 1 };
  const profile = { version: 1, decode: "codegemm" as const };
  const spec = { config: tinyConfig({}), from: 0, to: 1, first: true, last: true, profile, limits };
  const { model, seen } = recorder(spec);
  await warmUp(model, spec);
  assertEquals(seen, [{ decode: 0, prefill: 1, requests: 1 }]);
});
