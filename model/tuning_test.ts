import { assertEquals } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { randomModel, tinyConfig } from "./testing/random_model.ts";
import { parseChoices, tuneStage } from "./tuning.ts";
import { WeightStore } from "./weights.ts";

Deno.test("a stage's kernels are tried once, then remembered", async () => {
  const gpu = await Gpu.open({ software: true });
  try {
    if (!gpu.timestamps) return;
    const config = tinyConfig({ ffnSize: 160, heads: 4, codegemm: { m: 1, v: 4, g: 32, b: 8 } });
    const weights = new WeightStore(gpu);
    await weights.load(config, "layer.0", randomModel(config, 6));
    const spec = {
      config,
      from: 0,
      to: 1,
      first: false,
      last: false,
      limits: { maxRows: 4, maxSequences: 2, maxOutputs: 2, pages: 4, contextTokens: 64 },
      profile: { version: 1, decode: "codegemm" as const },
    };
    const written: string[] = [];
    const lines: string[] = [];
    const tune = () =>
      tuneStage(gpu, spec, weights, {
        read: () => Promise.resolve(written.at(-1) ?? null),
        write: (text) => Promise.resolve(void written.push(text)),
      }, (line) => lines.push(line));
    const variants = await tune();
    const shapes = new Set(lines).size;
    assertEquals([written.length, lines.length], [1, shapes]);
    assertEquals(parseChoices(written[0]).size, shapes);
    const { down } = weights.get("layer.0");
    assertEquals((await tune())!(down), variants!(down));
    assertEquals([written.length, lines.length], [1, shapes]);
    weights.destroy();
    gpu.check();
  } finally {
    gpu.close();
  }
});

Deno.test("of remembered choices, only those that could be made today count", () => {
  const text = JSON.stringify({
    a: { byBatch: { 1: { prefetch: true }, 8: { turnK: 64 } } },
    b: {},
    b2: { batches: [1, 4] },
    b5: { batches: [1, 16], byBatch: { 16: { turnK: 64 } } },
    b3: { batches: [3] },
    b4: { batches: [8] },
    c: { byBatch: { 1: { turnK: 7 } } },
    d: { byBatch: { 3: { prefetch: true } } },
    e: { batches: [1], unroll: "yes" },
    f: null,
  });
  assertEquals([...parseChoices(text)], [
    ["a", { byBatch: { 1: { prefetch: true }, 8: { turnK: 64 } } }],
    ["b", {}],
    ["b2", { batches: [1, 4] }],
    ["b5", { batches: [1, 16], byBatch: { 16: { turnK: 64 } } }],
  ]);
});

Deno.test("a torn or strange memory of choices is an empty one", () => {
  for (const text of [null, "", "{", "[]", "7", "null"]) assertEquals(parseChoices(text).size, 0);
});
