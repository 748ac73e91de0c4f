import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertLess,
  assertStringIncludes,
} from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { checkpointFiles, TINY_CONFIG } from "../shared/checkpoint/fixture.ts";
import {
  type Checkpoint,
  memorySource,
  openCheckpoint,
  parseModelConfig,
  wantedTensors,
} from "../shared/checkpoint/mod.ts";
import { allParts } from "../shared/checkpoint/layout.ts";
import type { CalibratedSettings } from "./calibrated.ts";
import { parseFormat } from "./format.ts";
import { VirtualClock } from "../shared/clock.ts";
import { quantizeCalibrated } from "./calibrated.ts";
import { cutSequences } from "./calibration_text.ts";
import { heldMemory } from "./gpu/operation.ts";
import { describePlan, DRIVER_BYTES, planQuantization } from "./plan.ts";
import { memoryWork } from "./work_files.ts";

const SETTINGS: CalibratedSettings = {
  fitRounds: 3,
  fitSteps: 50,
  blockSteps: 16,
  sampleGroups: 64,
  modelSteps: 0,
  rates: { codebooks: 0.003, scales: 0.003, norms: 0.001, codes: 0.02 },
  nextTokenShare: 0.3,
  seed: 1,
  batchSequences: 4,
  blockSequences: 64,
  keep: [],
  maxShardBytes: 2 ** 32,
};
/** What `--help` names for models that are too large to be tuned whole. */
const LARGE = { ...SETTINGS, batchSequences: 4, blockSequences: 128, fitRounds: 2, blockSteps: 32 };
/** Wide enough that what matters at large sizes matters. */
const WIDE_CONFIG = {
  ...TINY_CONFIG,
  hidden_size: 128,
  intermediate_size: 384,
  num_hidden_layers: 1,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 32,
};
const TEXT = { tokens: 512, sequences: 2048 };

const LLAMA_3_70B = {
  model_type: "llama",
  hidden_size: 8192,
  num_hidden_layers: 80,
  num_attention_heads: 64,
  num_key_value_heads: 8,
  intermediate_size: 28672,
  vocab_size: 128256,
};
/** The demo model's float original. */
const STORY_16M = {
  ...LLAMA_3_70B,
  hidden_size: 384,
  num_hidden_layers: 8,
  num_attention_heads: 6,
  num_key_value_heads: 2,
  intermediate_size: 1024,
  vocab_size: 4096,
};

/** A checkpoint without its weights: names and shapes only. */
function checkpointOf(shape: Record<string, unknown>): Checkpoint {
  const config = parseModelConfig(JSON.stringify(shape));
  const shapes = new Map(
    allParts(config).flatMap((part) => wantedTensors(config, part)).map((t) => [t.name, t.shape]),
  );
  return {
    config,
    names: () => [...shapes.keys()],
    info: (name: string) => {
      const shape = shapes.get(name)!;
      return { name, dtype: "F16", shape, bytes: 2 * shape.reduce((a, b) => a * b) };
    },
  } as Partial<Checkpoint> as Checkpoint;
}

Deno.test("70B at the setting that --help names fits 32 GiB of memory and a 16 GiB GPU", () => {
  const plan = planQuantization(
    checkpointOf(LLAMA_3_70B),
    parseFormat("m1v4g128"),
    LARGE,
    TEXT,
  );
  assertAlmostEquals(plan.bitsPerWeight, 2.125, 1e-3);
  // 68.5 billion weights at 2.125 bits, two float16 ends of 2.1 GB.
  assertAlmostEquals(plan.outputBytes / 1e9, 22.4, 0.1);
  assertLess(plan.ramBytes, 32 * 2 ** 30);
  assertLess(plan.blockGpuBytes, 16 * 2 ** 30);
  assertEquals(plan.modelGpuBytes, 0);
  assertStringIncludes(describePlan(plan), "not tuned whole");
});

Deno.test("the time foretold is what an H200 took for a block of 70B, and for the whole of story-16m", () => {
  const format = parseFormat("m1v4g128");
  const block = { ...LLAMA_3_70B, num_hidden_layers: 1, vocab_size: 1024 };
  const { seconds } = planQuantization(checkpointOf(block), format, LARGE, TEXT);
  assertAlmostEquals(seconds, 181, 5);
  const large = planQuantization(checkpointOf(LLAMA_3_70B), format, LARGE, TEXT);
  assertAlmostEquals(large.seconds / 3600, 4.03, 0.1);
  assertStringIncludes(describePlan(large), "about 4.1 h on an NVIDIA H200");
  const whole = { ...SETTINGS, modelSteps: 256, batchSequences: 16 };
  const small = planQuantization(checkpointOf(STORY_16M), format, whole, TEXT);
  assertAlmostEquals(small.seconds, 50, 5);
});

Deno.test("fewer sequences for blocks than a batch count as the batch that they become", () => {
  const plan = (blockSequences: number) =>
    planQuantization(
      checkpointOf(STORY_16M),
      parseFormat("m1v4g128"),
      { ...SETTINGS, blockSequences },
      TEXT,
    );
  assertEquals(plan(1), plan(SETTINGS.batchSequences));
});

Deno.test("model tuning takes more of everything", () => {
  const plan = (modelSteps: number) =>
    planQuantization(
      checkpointOf(LLAMA_3_70B),
      parseFormat("m1v4g128"),
      { ...SETTINGS, modelSteps },
      TEXT,
    );
  const [none, some] = [plan(0), plan(256)];
  assert(some.ramBytes > none.ramBytes && some.operations.model > none.operations.model);
  assert(some.modelGpuBytes > 4 * 68e9 && some.workBytes > 0);
});

Deno.test("what a run holds on the GPU stays within the plan, and is most of it", async () => {
  const gpu = await Gpu.open({ software: true, limits: "default" });
  try {
    const checkpoint = await openCheckpoint(memorySource(checkpointFiles(WIDE_CONFIG)));
    const format = parseFormat("m1v4g32");
    const text = cutSequences(new Uint16Array(4 * 128).map((_, i) => i % 64), 128, 4, 64);
    for (const blockSteps of [0, 1]) {
      const memory = heldMemory(gpu);
      memory.peakBytes = 0;
      const settings = { ...SETTINGS, fitRounds: 0, blockSteps };
      await quantizeCalibrated(checkpoint, format, text, settings, {
        gpu,
        clock: new VirtualClock(),
        sink: memoryWork(),
        work: memoryWork(),
      });
      const { blockGpuBytes } = planQuantization(checkpoint, format, settings, text);
      const planned = blockGpuBytes - DRIVER_BYTES;
      // Products of so small matrices are split, and have partial products beside them.
      assertLess(memory.peakBytes, 1.1 * planned);
      assertLess(planned, 1.3 * memory.peakBytes);
      assertEquals(memory.bytes, 0);
    }
  } finally {
    gpu.close();
  }
});
