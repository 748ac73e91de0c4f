import { assertEquals } from "@std/assert";
import { defaultVariant, kernelFor, mostRows } from "../kernels/mod.ts";
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
const PROFILE = { version: 1, decode: "codegemm" as const };

/** The rows of the warm-up steps of a stage within `limits`. */
async function warmedRows(limits: Partial<typeof LIMITS>, software: boolean) {
  const spec = {
    config: tinyConfig({}),
    from: 0,
    to: 1,
    first: true,
    last: true,
    profile: PROFILE,
    limits: { ...LIMITS, ...limits },
  };
  const { model, seen } = recorder(spec);
  await warmUp(model, spec, software);
  const counts = (rows: number[]) => rows.filter((count) => count > 0);
  return {
    decode: counts(seen.map(({ decode }) => decode)),
    prefill: counts(seen.map(({ prefill }) => prefill)),
  };
}

Deno.test("warm-up runs every decode batch and prefill tile, with as many outputs as have room", async () => {
  const config = tinyConfig({});
  for (const [first, last] of [[true, true], [true, false], [false, false], [false, true]]) {
    const spec = { config, from: 0, to: 1, first, last, profile: PROFILE, limits: LIMITS };
    const { model, seen } = recorder(spec);
    await warmUp(model, spec, false);
    assertEquals(seen.map(({ decode }) => decode), [1, 2, 4, 8, 16, 0, 0, 0]);
    assertEquals(seen.map(({ prefill }) => prefill), [0, 0, 0, 0, 0, 1, 17, 33]);
    assertEquals(
      seen.map(({ requests }) => requests),
      last ? [1, 2, 4, 4, 4, 1, 4, 4] : [0, 0, 0, 0, 0, 0, 0, 0],
    );
  }
});

Deno.test("no step that the limits allow runs a linear kernel that warm-up has not", async () => {
  for (const software of [true, false]) {
    const { batches, prefillTiles } = defaultVariant(software);
    const kernels = batches.map((batch) => ({ batch }));
    const batchOf = (rows: number) => kernelFor(kernels, rows).batch;
    const tileOf = (rows: number) =>
      prefillTiles.find((tile) => mostRows(tile) >= rows) ?? prefillTiles.at(-1)!;
    for (const most of [1, 2, 3, 8, 9, 15, 16, 17, 40, 64]) {
      const all = Array.from({ length: most }, (_, i) => i + 1);
      const { decode, prefill } = await warmedRows({ maxRows: most, maxSequences: most }, software);
      const sequences = all.filter((rows) => rows <= LIMITS.pages);
      assertEquals(new Set(decode.map(batchOf)), new Set(sequences.map(batchOf)), `${most} decode`);
      assertEquals(new Set(prefill.map(tileOf)), new Set(all.map(tileOf)), `${most} prefill`);
    }
  }
});

Deno.test("warm-up keeps to the smallest limits there are", async () => {
  const limits = { maxRows: 1, maxSequences: 1, maxOutputs: 1, pages: 1, contextTokens: 1 };
  for (const software of [true, false]) {
    assertEquals(await warmedRows(limits, software), { decode: [1], prefill: [1] });
  }
});
