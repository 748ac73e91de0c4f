import { assert, assertLessOrEqual } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { linearScratchBytes } from "../kernels/linear/mod.ts";
import { codeOrder } from "../kernels/linear/order.ts";
import { decodeScratchSize } from "../kernels/transformer/attention.ts";
import { headShape } from "../kernels/transformer/kv_layout.ts";
import { StageModel } from "../model/stage_model.ts";
import { randomModel, tinyConfig } from "../model/testing/random_model.ts";
import { WeightStore } from "../model/weights.ts";
import { stageFootprint } from "../shared/footprint.ts";
import { LIMITS } from "../shared/limits.ts";
import { LINEAR_NAMES, linearShape, type ModelConfig, stageParts } from "../shared/model_config.ts";
import type { StageLimits } from "../shared/protocol.ts";

const limits: StageLimits = {
  maxRows: 40,
  maxSequences: 8,
  maxOutputs: 8,
  pages: 24,
  contextTokens: 512,
};

const configs: Record<string, ModelConfig> = {
  "an odd dense model": tinyConfig(),
  "a tied dense model": tinyConfig({ tiedEmbeddings: true }),
  "a CodeGEMM model": tinyConfig({
    hiddenSize: 128,
    ffnSize: 256,
    headDim: 16,
    heads: 8,
    codegemm: { m: 1, v: 4, g: 64, b: 8 },
  }),
  // Small beside its codebooks of a MiB for each matrix, stacked where they can be.
  "a model of 16-bit codes": tinyConfig({
    ffnSize: 256,
    headDim: 64,
    heads: 4,
    kvHeads: 4,
    codegemm: { m: 1, v: 8, g: -1, b: 16 },
  }),
};

Deno.test("what a stage takes on the GPU stays within what the planner counts with", async (t) => {
  const gpu = await Gpu.open({ software: true });
  for (const [name, config] of Object.entries(configs)) {
    const tensors = randomModel(config, 1);
    for (const [from, to] of [[0, config.layers], [0, 1], [1, 2], [2, 3]]) {
      await t.step(`${name}, layers ${from} to ${to - 1}`, async () => {
        const range = { from, to, first: from === 0, last: to === config.layers };
        const weights = new WeightStore(gpu);
        for (const part of stageParts(range)) await weights.load(config, part, tensors);
        // Takes what other families take, and room for activations as integers.
        const profile = { version: 1, decode: "int8" } as const;
        const stage = await StageModel.load(gpu, { config, ...range, limits, profile }, weights);
        const { weightBytes, kvBytes, totalBytes } = stageFootprint(config, range, limits);
        assertLessOrEqual(weights.bytes, weightBytes, "weights");
        // What the driver holds while weights are written is not the stage's to count.
        assertLessOrEqual(stage.memoryBytes, totalBytes - LIMITS.maxShardBytes, "all of it");
        assert(stage.memoryBytes > weights.bytes + kvBytes, "pages are counted exactly");
        stage.destroy();
        weights.destroy();
      });
    }
  }
  gpu.close();
});

Deno.test("scratch of an 8B and a 70B model covers what the kernels ask for, and is not far above", () => {
  const large = { headDim: 128, kvHeads: 8, vocabSize: 128256, contextTokens: 8192 };
  const sizes = [
    { hiddenSize: 4096, heads: 32, ffnSize: 14336 },
    { hiddenSize: 8192, heads: 64, ffnSize: 28672 },
  ];
  for (const size of sizes) {
    for (const codegemm of [null, { m: 1, v: 4, g: 128, b: 8 }, { m: 2, v: 8, g: 128, b: 8 }]) {
      const config = tinyConfig({ ...large, ...size, codegemm });
      const bounds = { ...limits, maxRows: 60, maxOutputs: 32, contextTokens: 8192 };
      const linear = Math.max(
        ...LINEAR_NAMES.map((name) =>
          linearScratchBytes(linearShape(config, name), codegemm, bounds.maxRows)
        ),
        linearScratchBytes([config.vocabSize, config.hiddenSize], null, bounds.maxOutputs),
      );
      const attention = decodeScratchSize(headShape(config), bounds).bytes;
      const logits = bounds.maxOutputs * config.vocabSize * 4;
      const rows = bounds.maxRows * (config.ffnSize * 10 + config.hiddenSize * 20);
      const asked = linear + attention + logits + rows;
      const range = { from: 0, to: 1, first: true, last: true };
      const { scratchBytes } = stageFootprint(config, range, bounds);
      assertLessOrEqual(asked, scratchBytes);
      assertLessOrEqual(scratchBytes, 1.6 * asked + LIMITS.maxShardBytes);
    }
  }
});

Deno.test("partial sums of few rows, and of stacks of matrices, are counted in full", () => {
  const codegemm = { m: 1, v: 4, g: 128, b: 8 };
  // K so short that a row's partial sums are bounded by it, not by what fills a GPU.
  const [hiddenSize, ffnSize, heads, kvHeads, headDim] = [1024, 6144, 8, 8, 128];
  const config = tinyConfig({ hiddenSize, ffnSize, heads, kvHeads, headDim, codegemm });
  const range = { from: 1, to: 2, first: false, last: false };
  const stacks = [[1024, 1024, 1024], [ffnSize, ffnSize]];
  for (const maxRows of [1, 9, 40]) {
    const bounds = { ...limits, maxRows };
    const partials = Math.max(...stacks.map((members) => {
      const shape = [members.reduce((sum, n) => sum + n), hiddenSize] as const;
      const order = codeOrder(shape, codegemm, undefined, members);
      return linearScratchBytes(shape, codegemm, maxRows, order);
    }));
    const attention = decodeScratchSize(headShape(config), bounds).bytes;
    const { scratchBytes } = stageFootprint(config, range, bounds);
    assertLessOrEqual(partials + attention, scratchBytes - LIMITS.maxShardBytes, `${maxRows} rows`);
  }
});
