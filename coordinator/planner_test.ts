import {
  assert,
  assertEquals,
  assertLessOrEqual,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { stepFrameBytes } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import { PROTOCOL_VERSION } from "../shared/protocol.ts";
import { type Plan, type PlanRequest, planStages, type PlanWorker } from "./planner.ts";

const GiB = 2 ** 30;

const small: ModelConfig = {
  hiddenSize: 384,
  layers: 8,
  heads: 6,
  kvHeads: 2,
  headDim: 64,
  ffnSize: 1024,
  vocabSize: 4096,
  contextTokens: 2048,
  rmsNormEps: 1e-5,
  ropeTheta: 500000,
  ropeScaling: null,
  tiedEmbeddings: false,
  bosToken: 4091,
  eosTokens: [4092, 4095],
  codegemm: null,
};

/** Llama 3 70B. */
const large: ModelConfig = {
  ...small,
  hiddenSize: 8192,
  layers: 80,
  heads: 64,
  kvHeads: 8,
  headDim: 128,
  ffnSize: 28672,
  vocabSize: 128256,
  contextTokens: 8192,
  codegemm: { m: 1, v: 4, g: 128, b: 8 },
};

function worker(name: string, memoryGiB: number, changes: Partial<PlanWorker["card"]> = {}) {
  const card: PlanWorker["card"] = {
    version: PROTOCOL_VERSION,
    worker: name,
    instance: `${name}-1`,
    host: name,
    gpu: { name: "a GPU", software: false },
    memoryBytes: memoryGiB * GiB,
    maxBindingBytes: 2 * GiB,
    selfTestDigest: "0".repeat(64),
    calibration: {
      denseBytesPerMs: 1e9,
      codegemmBytesPerMs: 8e8,
      wideCodeBytesPerMs: 3e8,
      overheadMsPerLayer: 0.02,
    },
    cachedParts: [],
    ...changes,
  };
  return { card, roundTripMs: 0.4 };
}

function request(changes: Partial<PlanRequest> & { workers: PlanWorker[] }): PlanRequest {
  return {
    config: small,
    partBytes: new Map(),
    wish: { contextTokens: 2048, maxSequences: 16 },
    objective: "throughput",
    maxFrameBytes: LIMITS.maxFrameBytes,
    ...changes,
  };
}

function checkPlan(plan: Plan, { config, workers }: PlanRequest): void {
  assert(plan.stages[0].first && plan.stages.at(-1)!.last);
  let from = 0;
  for (const [index, stage] of plan.stages.entries()) {
    assertEquals([stage.from, stage.first], [from, index === 0]);
    assertEquals(stage.last, index === plan.stages.length - 1);
    assert(stage.to > stage.from);
    from = stage.to;
    const { card } = workers.find(({ card }) => card.worker === stage.worker)!;
    const bytes = stage.weightBytes + stage.kvBytes + stage.scratchBytes;
    assertLessOrEqual(bytes, card.memoryBytes);
  }
  assertEquals(from, config.layers);
  assertEquals(plan.explanation.length, workers.length);
}

Deno.test("planStages() gives every worker an even share of the demo model when spread", () => {
  for (const count of [1, 2, 3, 4]) {
    const workers = Array.from({ length: count }, (_, i) => worker(`w${i}`, 1));
    const asked = request({ workers, objective: "spread" });
    const plan = planStages(asked);
    checkPlan(plan, asked);
    assertEquals(plan.stages.length, count);
    const sizes = plan.stages.map(({ from, to }) => to - from);
    assertLessOrEqual(Math.max(...sizes) - Math.min(...sizes), 1);
  }
});

Deno.test("planStages() places a 70B model at two bits on two GPUs of 24 GiB", () => {
  const workers = [worker("a", 22), worker("b", 22)];
  const asked = request({ workers, config: large, wish: { contextTokens: 8192, maxSequences: 8 } });
  const plan = planStages(asked);
  checkPlan(plan, asked);
  assertEquals(plan.stages.length, 2);
  assertEquals(plan.limits.pages, 8 * 256);
});

Deno.test("planStages() lowers the number of pages before it gives up", () => {
  const workers = [worker("a", 16), worker("b", 16)];
  const wish = { contextTokens: 8192, maxSequences: 64 };
  const asked = request({ workers, config: large, wish });
  const plan = planStages(asked);
  checkPlan(plan, asked);
  assert(plan.limits.pages >= 256 && plan.limits.pages < 64 * 256, `${plan.limits.pages} pages`);
});

Deno.test("planStages() refuses when memory is short, and says how much is missing", () => {
  const config = { ...large, codegemm: null };
  const asked = request({ workers: [worker("a", 8), worker("b", 8)], config });
  const error = assertThrows(() => planStages(asked), FleetError);
  assertEquals(error.code, "out-of-memory");
  assert(
    /^Cannot place the model: 1\d\d\.\d GiB needed, 16\.0 GiB free on 2 workers; add a worker, or quantize with --format m1v4g128$/
      .test(error.message),
    error.message,
  );
});

Deno.test("planStages() says so when memory suffices only in pieces smaller than a layer", () => {
  const workers = Array.from({ length: 200 }, (_, i) => worker(`w${i}`, 0.4));
  const error = assertThrows(() => planStages(request({ workers, config: large })), FleetError);
  assertStringIncludes(error.message, "do not divide into whole layers");
});

Deno.test("planStages() bounds the rows of a step so that its frame fits at every stage", () => {
  const workers = Array.from({ length: 4 }, (_, i) => worker(`w${i}`, 40));
  const { limits, stages } = planStages(request({ workers, config: large, objective: "spread" }));
  const bytes = stepFrameBytes({
    rows: limits.maxRows,
    sequences: limits.maxSequences,
    pageEntries: limits.maxSequences * limits.contextTokens / LIMITS.pageTokens,
    requests: limits.maxOutputs,
    biasEntries: 0,
    countEntries: 0,
    hiddenSize: large.hiddenSize,
    stages: stages.length,
  });
  assertLessOrEqual(bytes, LIMITS.maxFrameBytes);
  assert(limits.maxRows >= 60, `${limits.maxRows} rows`);
});

Deno.test("planStages() keeps a layer's pages within every adapter's largest binding", () => {
  const maxBindingBytes = 128 * 2 ** 20;
  const workers = [worker("a", 80, { maxBindingBytes }), worker("b", 80)];
  const wish = { contextTokens: 8192, maxSequences: 64 };
  const asked = request({ workers, config: large, wish, objective: "spread" });
  const { limits, stages } = planStages(asked);
  const bytes = limits.pages * LIMITS.pageTokens * large.kvHeads * large.headDim * 2;
  const uses = stages.some((stage) => stage.worker === "a");
  assert(!uses || bytes <= maxBindingBytes);
});

Deno.test("planStages() leaves a slow worker out and says why", () => {
  const crawl = {
    denseBytesPerMs: 1e6,
    codegemmBytesPerMs: 1e6,
    wideCodeBytesPerMs: 1e6,
    overheadMsPerLayer: 1,
  };
  const workers = [
    worker("quick", 40),
    worker("slow", 40, { calibration: crawl }),
    worker("tiny", 0.01),
  ];
  for (const objective of ["latency", "throughput"] as const) {
    const plan = planStages(request({ workers, config: large, objective }));
    assertEquals(plan.stages.map((stage) => stage.worker), ["quick"]);
    assertStringIncludes(plan.explanation[1], "slow (a GPU) is left out: ");
    assertStringIncludes(plan.explanation[2], "cannot hold one layer");
  }
});

Deno.test("planStages() foretells each kind of weights by the rate measured for it", () => {
  const ms = (codegemm: ModelConfig["codegemm"]) => {
    const plan = planStages(
      request({ workers: [worker("a", 200)], config: { ...large, codegemm } }),
    );
    return plan.stages[0].predictedMs;
  };
  const [codes, wide, dense] = [
    ms({ m: 1, v: 4, g: 128, b: 8 }),
    ms({ m: 1, v: 8, g: -1, b: 16 }),
    ms(null),
  ];
  // 17 GB of codes at 0.3 TB/s; 18 GB at 0.8 TB/s; 137 GB at 1 TB/s.
  assert(wide > 2 * codes && dense > 2 * wide, `${codes}, ${wide}, ${dense} ms`);
});

Deno.test("planStages() counts codebooks as memory, not as weights that every token reads", () => {
  // 7 MiB of codebooks a layer beside a third of a MB of codes.
  const config = { ...small, codegemm: { m: 1, v: 8, g: -1, b: 16 } };
  const { stages: [stage] } = planStages(request({ workers: [worker("a", 4)], config }));
  assert(stage.weightBytes > small.layers * 7 * 2 ** 20, `${stage.weightBytes} bytes`);
  const { overheadMsPerLayer, wideCodeBytesPerMs } = worker("a", 4).card.calibration;
  const readMs = stage.predictedMs - (small.layers + 1) * overheadMsPerLayer;
  assert(readMs < small.layers * 2 ** 20 / wideCodeBytesPerMs, `${readMs} ms`);
});

Deno.test("planStages() says that nobody is there", () => {
  const error = assertThrows(() => planStages(request({ workers: [] })), FleetError);
  assertEquals(error.code, "unavailable");
});
