import { assert, assertAlmostEquals, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import type { StepBatch } from "../shared/frames.ts";
import { stageFootprint } from "../shared/footprint.ts";
import { type ModelConfig, stageParts } from "../shared/model_config.ts";
import type { NumericsProfile } from "../shared/protocol.ts";
import { randomInt, seededRandom } from "../shared/random.ts";
import { Gpu } from "../kernels/gpu.ts";
import { GpuTimer } from "./gpu_timer.ts";
import { loadReference } from "./reference.ts";
import { StageModel } from "./stage_model.ts";
import { type ChainOptions, type ChainRow, StageChain, stepBatch } from "./stage_chain.ts";
import { randomModel, tinyConfig } from "./testing/random_model.ts";
import { WeightStore } from "./weights.ts";

const LIMITS = { maxRows: 48, maxSequences: 4, maxOutputs: 48, pages: 24, contextTokens: 192 };
const PROFILE = { version: 1, decode: "codegemm" } as const;
const LOGITS = { type: "logits" } as const;

/** One device for all tests but those that break it: most of their time goes into compiling kernels. */
let shared: Promise<Gpu> | null = null;
globalThis.addEventListener("unload", () => void shared?.then((gpu) => gpu.close()));

async function withGpu(test: (gpu: Gpu) => Promise<void>): Promise<void> {
  shared ??= Gpu.open({ software: true, limits: "default" });
  await test(await shared);
}

/** Page tables of `count` sequences, in an order of no meaning. */
function pageTables(count: number): Uint32Array[] {
  const each = LIMITS.pages / LIMITS.maxSequences;
  return Array.from(
    { length: count },
    (_, s) => Uint32Array.from({ length: each }, (_, i) => (i * LIMITS.maxSequences + s * 7) % 24),
  );
}

function randomTokens(config: ModelConfig, count: number, seed: number): number[] {
  const random = seededRandom(seed);
  return Array.from({ length: count }, () => randomInt(random, config.vocabSize));
}

const rowsOf = (sequence: number, tokens: number[], from: number, to: number): ChainRow[] =>
  tokens.slice(from, to).map((token, i) => ({
    sequence,
    position: from + i,
    token,
    request: LOGITS,
  }));

/** Rows of logits as bits. */
async function logitBits(chain: StageChain, batch: StepBatch): Promise<Uint32Array[]> {
  const { results } = await chain.step(batch);
  return results.map((result) => {
    assert(result.type === "logits");
    return new Uint32Array(result.logits.slice().buffer);
  });
}

const STACKED = "codegemm m1v4g32, q k v and gate up in stacks";

const MODELS: Record<string, ModelConfig> = {
  "dense, heads of 8": tinyConfig(),
  "dense, heads of 40, tied, llama3 scaling": tinyConfig({
    hiddenSize: 100,
    heads: 3,
    kvHeads: 1,
    headDim: 40,
    tiedEmbeddings: true,
    ropeScaling: { factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalContextTokens: 64 },
  }),
  "codegemm m1v4g32": tinyConfig({ ffnSize: 160, heads: 4, codegemm: { m: 1, v: 4, g: 32, b: 8 } }),
  [STACKED]: tinyConfig({
    hiddenSize: 128,
    heads: 8,
    kvHeads: 4,
    headDim: 64,
    ffnSize: 256,
    codegemm: { m: 1, v: 4, g: 32, b: 8 },
  }),
  "codegemm m2v8g64": tinyConfig({
    hiddenSize: 128,
    heads: 8,
    headDim: 16,
    ffnSize: 192,
    codegemm: { m: 2, v: 8, g: 64, b: 8 },
  }),
};

async function agreesWithReference(
  gpu: Gpu,
  config: ModelConfig,
  kernels: Pick<ChainOptions, "profile" | "variants"> = {},
  tolerance = 0.01,
): Promise<void> {
  const tensors = randomModel(config, 11);
  const reference = await loadReference(config, tensors);
  const chain = await StageChain.load({ gpu, config, tensors, limits: LIMITS, ...kernels });
  const pages = pageTables(2);
  const [a, b] = [randomTokens(config, 40, 1), randomTokens(config, 7, 2)];
  const expected = { a: reference.logits(a), b: reference.logits(b) };
  const prefill = [...rowsOf(0, a, 0, 38), ...rowsOf(1, b, 0, 5)];
  const decode = [...rowsOf(0, a, 38, 40), ...rowsOf(1, b, 5, 7)];
  const got = [
    ...await logitBits(chain, stepBatch(pages, prefill, 0)),
    ...await logitBits(chain, stepBatch(pages, decode, decode.length)),
  ].map((bits) => new Float32Array(bits.buffer));
  const wanted = [
    ...expected.a.slice(0, 38),
    ...expected.b.slice(0, 5),
    ...expected.a.slice(38),
    ...expected.b.slice(5),
  ];
  assertEquals(got.length, wanted.length);
  let worst = 0, spread = 0;
  got.forEach((logits, row) =>
    logits.forEach((logit, i) => {
      worst = Math.max(worst, Math.abs(logit - wanted[row][i]));
      spread = Math.max(spread, Math.abs(wanted[row][i]));
    })
  );
  assert(spread > 2, `logits of ${spread} at most tell nothing`);
  assertAlmostEquals(worst, 0, tolerance * spread);
  chain.destroy();
}

for (const [name, config] of Object.entries(MODELS)) {
  Deno.test(`a stage with all layers agrees with the reference model: ${name}`, () =>
    withGpu((gpu) => agreesWithReference(gpu, config)));
}

Deno.test("a stage with the decode kernels of a GPU agrees with the reference model", () =>
  withGpu(async (gpu) => {
    // Whole sums finished by RoPE and SwiGLU, and partial ones.
    for (const batches of [[2], [4]] as const) {
      await agreesWithReference(gpu, MODELS[STACKED], {
        profile: { version: 1, decode: "dequantize" },
        variants: () => ({ unroll: true, batches, decode: { turnK: 16 } }),
      });
    }
  }));

Deno.test("a stage that multiplies in eight-bit integers agrees with the reference model", () =>
  withGpu(async (gpu) => {
    // Activations are rounded by workgroups, and ahead of them.
    for (const batches of [[2], [4]] as const) {
      await agreesWithReference(gpu, MODELS[STACKED], {
        profile: { version: 1, decode: "int8" },
        variants: () => ({ batches }),
      }, 0.05);
    }
  }));

for (
  const [name, decode] of [
    ["codegemm m1v4g32", "codegemm"],
    [STACKED, "codegemm"],
    [STACKED, "int8"],
  ] as const
) {
  Deno.test(`stages, chunks, batch mates and pages change no bit of a row: ${name}, ${decode}`, () =>
    withGpu((gpu) => changesNoBit(gpu, MODELS[name], { version: 1, decode })));
}

Deno.test("as many decode rows as a stage of short contexts allows have the bits that they have alone", () =>
  withGpu(async (gpu) => {
    const config = MODELS[STACKED];
    const limits = { ...LIMITS, maxRows: 8, maxOutputs: 8, contextTokens: 64 };
    const tokens = randomTokens(config, 40, 6);
    const pages = [Uint32Array.of(5, 2)];
    const run = async (each: number) => {
      const tensors = randomModel(config, 5);
      const chain = await StageChain.load({ gpu, config, tensors, limits });
      const bits: Uint32Array[] = [];
      for (let at = 0; at < 32; at += 8) {
        await chain.step(stepBatch(pages, rowsOf(0, tokens, at, at + 8), 0));
      }
      for (let at = 32; at < 40; at += each) {
        const rows = rowsOf(0, tokens, at, at + each);
        bits.push(...await logitBits(chain, stepBatch(pages, rows, each)));
      }
      chain.destroy();
      return bits;
    };
    assertEquals(await run(8), await run(1));
  }));

async function changesNoBit(
  gpu: Gpu,
  config: ModelConfig,
  profile: NumericsProfile,
): Promise<void> {
  const tensors = randomModel(config, 5);
  const tokens = randomTokens(config, 37, 3);
  const mate = randomTokens(config, 37, 4);
  const run = async (cuts: number[], chunk: number, mates: number, swap: boolean) => {
    const chain = await StageChain.load({ gpu, config, tensors, limits: LIMITS, cuts, profile });
    const pages = pageTables(3);
    if (swap) pages.reverse();
    const bits: Uint32Array[] = [];
    for (let at = 0; at < 35; at += chunk) {
      const rows = [
        ...rowsOf(0, mate, 0, mates),
        ...rowsOf(2, tokens, at, Math.min(35, at + chunk)),
      ];
      bits.push(...(await logitBits(chain, stepBatch(pages, rows, 0))).slice(mates));
    }
    for (const at of [35, 36]) {
      const decode = [...rowsOf(2, tokens, at, at + 1), ...rowsOf(0, mate, mates, mates + mates)];
      const batch = stepBatch(pages, [...decode, ...rowsOf(1, mate, 0, mates)], decode.length);
      bits.push((await logitBits(chain, batch))[0]);
    }
    chain.destroy();
    return bits;
  };
  const alone = await run([], 35, 0, false);
  assertEquals(alone.length, 37);
  assertEquals(await run([1], 35, 0, true), alone);
  assertEquals(await run([1, 2], 7, 5, false), alone);
  assertEquals(await run([2], 1, 3, false), alone);
}

Deno.test("two steps may be in flight, and replaying a step gives the same bits again", () =>
  withGpu(async (gpu) => {
    const config = tinyConfig();
    const tensors = randomModel(config, 6);
    const weights = new WeightStore(gpu);
    for (const part of ["embedding", "layer.0", "layer.1"] as const) {
      await weights.load(config, part, tensors);
    }
    const spec = { config, from: 0, to: 2, first: true, last: false };
    const stage = await StageModel.load(
      gpu,
      { ...spec, limits: LIMITS, profile: PROFILE },
      weights,
    );
    const tokens = randomTokens(config, 20, 7);
    const batchAt = (from: number, to: number, decode: boolean) =>
      stepBatch(
        pageTables(1),
        rowsOf(0, tokens, from, to).map(({ request: _, ...row }) => row),
        decode ? to - from : 0,
      );
    const steps = [batchAt(0, 17, false), batchAt(17, 18, true), batchAt(18, 20, true)];
    const oneByOne = [];
    for (const step of steps) {
      oneByOne.push((await stage.finish(stage.submit(step, null))).hidden);
    }
    assertEquals(oneByOne.map((hidden) => hidden!.length), [17 * 64, 64, 2 * 64]);
    const first = stage.submit(steps[0], null), second = stage.submit(steps[1], null);
    assertThrows(() => stage.submit(steps[2], null), Error, "2 steps are in flight");
    await assertRejects(() => stage.finish(second), Error, "in the order");
    const overlapped = [(await stage.finish(first)).hidden];
    const third = stage.submit(steps[2], null);
    const output = await stage.finish(second);
    overlapped.push(output.hidden, (await stage.finish(third)).hidden);
    assertEquals(overlapped, oneByOne);
    assert(output.gpuMs > 0 && output.readbackMs >= 0);
    assert(stage.memoryBytes > weights.bytes);
    stage.destroy();
    weights.destroy();
  }));

Deno.test("a stage that is submitted in parts, ahead or behind another step, changes no bit", () =>
  withGpu(async (gpu) => {
    const config = tinyConfig({ layers: 14 });
    const tensors = randomModel(config, 6);
    const tokens = randomTokens(config, 30, 7);
    const batches = [
      stepBatch(pageTables(1), rowsOf(0, tokens, 0, 20), 0),
      // Enough of them alike for the next ones to be encoded ahead.
      ...Array.from(
        { length: 10 },
        (_, i) => stepBatch(pageTables(1), rowsOf(0, tokens, 20 + i, 21 + i), 1),
      ),
    ];
    const short = await StageChain.load({ gpu, config, tensors, limits: LIMITS, cuts: [7] });
    const expected = [];
    for (const batch of batches) expected.push((await short.step(batch)).results);
    short.destroy();

    const weights = new WeightStore(gpu);
    const span = { from: 0, to: 14, first: true, last: true };
    for (const part of stageParts(span)) await weights.load(config, part, tensors);
    const spec = { config, ...span, limits: LIMITS, profile: PROFILE };
    const stage = await StageModel.load(gpu, spec, weights);
    assertEquals(stage.busyForMs(), 0);
    const alone = [];
    for (const batch of batches) {
      const ticket = stage.submit(batch, null);
      stage.prepare();
      alone.push((await stage.finish(ticket)).results);
    }
    assertEquals(alone, expected);
    const { software } = gpu.info;
    for (const oneByOne of [false, true]) {
      gpu.info.software = !oneByOne; // a GPU that is none gets the parts of a step one by one
      const behind = [];
      let running = stage.submit(batches[0], null);
      for (const batch of batches.slice(1)) {
        const next = stage.submit(batch, null);
        behind.push((await stage.finish(running)).results);
        stage.prepare();
        running = next;
      }
      behind.push((await stage.finish(running)).results);
      assertEquals(behind, expected);
    }
    gpu.info.software = software;
    stage.destroy();
    weights.destroy();
  }));

Deno.test("a step is encoded ahead only where many were alike, for what is in vain stays in memory", () =>
  withGpu(async (gpu) => {
    const { stage, weights, batch } = await firstLayers(gpu);
    const other = stepBatch(pageTables(2), [0, 1].map((sequence) => ({ ...ROW, sequence })), 2);
    const { device } = gpu, create = device.createCommandEncoder;
    let encoders = 0;
    device.createCommandEncoder = (descriptor) => (encoders++, create.call(device, descriptor));
    const encodersOf = async (steps: StepBatch[]) => {
      encoders = 0;
      const ahead: number[] = [];
      for (const step of steps) {
        const ticket = stage.submit(step, null);
        const before = encoders;
        stage.prepare();
        ahead.push(encoders - before);
        await stage.finish(ticket);
      }
      return { encoders, ahead };
    };
    try {
      const turns = Array.from({ length: 24 }, (_, i) => i % 4 < 2 ? batch : other);
      assertEquals(await encodersOf(turns), { encoders: 48, ahead: new Array(24).fill(0) });
      const alike = await encodersOf(new Array(12).fill(batch));
      assertEquals(alike, { encoders: 25, ahead: [...new Array(7).fill(0), 1, 1, 1, 1, 1] });
    } finally {
      device.createCommandEncoder = create;
    }
    stage.destroy();
    weights.destroy();
  }));

Deno.test("a refused step touches no page", () =>
  withGpu(async (gpu) => {
    const config = tinyConfig();
    const tensors = randomModel(config, 6);
    const tokens = randomTokens(config, 12, 7);
    const run = async (meddle: (chain: StageChain) => Promise<void>) => {
      const chain = await StageChain.load({ gpu, config, tensors, limits: LIMITS });
      await chain.step(stepBatch(pageTables(1), rowsOf(0, tokens, 0, 10), 0));
      await meddle(chain);
      const bits = await logitBits(chain, stepBatch(pageTables(1), rowsOf(0, tokens, 10, 12), 2));
      chain.destroy();
      return bits;
    };
    const untouched = await run(() => Promise.resolve());
    const refused = await run(async (chain) => {
      const other = tokens.map((token) => (token + 1) % config.vocabSize);
      const rows = [...rowsOf(0, other, 3, 9), { sequence: 0, position: 9, token: 101 }];
      const bad = stepBatch(pageTables(1), rows, 0);
      const error = await assertRejects(() => chain.step(bad), FleetError);
      assertEquals(error.code, "bad-frame");
    });
    assertEquals(refused, untouched);
  }));

const ROW = { sequence: 0, position: 0, token: 1 };

/** A stage of a tiny model's first layers, and a step of one row for it. */
async function firstLayers(gpu: Gpu) {
  const config = tinyConfig({ layers: 1 });
  const weights = new WeightStore(gpu);
  const tensors = randomModel(config, 6);
  for (const part of ["embedding", "layer.0"] as const) await weights.load(config, part, tensors);
  const spec = { config, from: 0, to: 1, first: true, last: false };
  const stage = await StageModel.load(gpu, { ...spec, limits: LIMITS, profile: PROFILE }, weights);
  return { stage, weights, batch: stepBatch(pageTables(1), [ROW], 1) };
}

Deno.test("an error on the device makes the next finish throw", async () => {
  const gpu = await Gpu.open({ software: true, limits: "default" });
  const { stage, batch } = await firstLayers(gpu);
  await stage.finish(stage.submit(batch, null));
  const tickets = [stage.submit(batch, null), stage.submit(batch, null)];
  const told = new Promise((resolve) => gpu.device.addEventListener("uncapturederror", resolve));
  gpu.device.queue.writeBuffer(gpu.storage("small", 16), 0, new Uint8Array(64));
  await told;
  for (const ticket of tickets) {
    const error = await assertRejects(() => stage.finish(ticket), FleetError);
    assertEquals(error.code, "gpu");
    // The second step was never submitted: nobody may wait for it.
    assert(stage.busyForMs() <= 0, `${stage.busyForMs()} ms of a failed GPU's work`);
  }
  gpu.close();
});

Deno.test("a step that comes while a read lets the event loop turn is run like any other", () =>
  withGpu(async (gpu) => {
    const { stage, weights, batch } = await firstLayers(gpu);
    const { hidden } = await stage.finish(stage.submit(batch, null));
    // Reads that nobody lets the loop turn after pile up, until one of them turns it itself.
    for (let came = 0, steps = 0; came < 2; steps++) {
      assert(steps < 10_000, "a read lets the loop turn now and then");
      let done = false;
      const reading = stage.finish(stage.submit(batch, null)).finally(() => done = true);
      for (let i = 0; i < 20; i++) await Promise.resolve();
      if (done) continue;
      came++;
      const tickets = [stage.submit(batch, null), stage.submit(batch, null)];
      await reading;
      for (const ticket of tickets) assertEquals((await stage.finish(ticket)).hidden, hidden);
    }
    stage.destroy();
    weights.destroy();
  }));

Deno.test("whatever a GPU's clock says, a step took no longer than it was waited for", () =>
  withGpu(async (gpu) => {
    const { stage, weights, batch } = await firstLayers(gpu);
    const { span } = GpuTimer;
    GpuTimer.span = () => ({ beginNs: 0n, endNs: 10n ** 18n });
    try {
      for (let i = 0; i < 3; i++) {
        const fromMs = performance.now();
        const ticket = stage.submit(batch, null);
        const foretoldMs = stage.busyForMs();
        const { gpuMs } = await stage.finish(ticket);
        const wallMs = performance.now() - fromMs;
        assert(gpuMs <= wallMs, `${gpuMs} ms on the GPU within ${wallMs} ms`);
        assert(foretoldMs < 10_000, `${foretoldMs} ms are foretold`);
      }
    } finally {
      GpuTimer.span = span;
    }
    stage.destroy();
    weights.destroy();
  }));

Deno.test("a stage takes no more memory than its footprint foretells", () =>
  withGpu(async (gpu) => {
    const bounds = { ...LIMITS, maxRows: 64, maxOutputs: 16, pages: 300, contextTokens: 2048 };
    for (const name of ["dense, heads of 8", "codegemm m2v8g64"]) {
      const config = { ...MODELS[name], vocabSize: 4000 };
      const tensors = randomModel(config, 12);
      const weights = new WeightStore(gpu);
      const stages = [
        { from: 0, to: 1, first: true, last: false },
        { from: 1, to: 3, first: false, last: true },
      ];
      for (const stage of stages) {
        for (const part of stageParts(stage)) await weights.load(config, part, tensors);
        const spec = { config, ...stage, limits: bounds, profile: PROFILE };
        const model = await StageModel.load(gpu, spec, weights);
        const { totalBytes } = stageFootprint(config, stage, bounds);
        assert(model.memoryBytes <= totalBytes, `${model.memoryBytes} of ${totalBytes} bytes`);
        model.destroy();
      }
      weights.destroy();
    }
  }));

Deno.test("a part is loaded once, shared by stages, and freed when it is no longer named", () =>
  withGpu(async (gpu) => {
    const config = tinyConfig({ layers: 2 });
    const tensors = randomModel(config, 8);
    let reads = 0;
    const counted = {
      ...tensors,
      read: (name: string, offset: number, length: number) => {
        reads++;
        return tensors.read(name, offset, length);
      },
    };
    const weights = new WeightStore(gpu);
    await weights.load(config, "layer.1", counted, "digest of layer 1");
    const afterFirst = reads;
    assert(afterFirst >= 9);
    await weights.load(config, "layer.1", counted, "digest of layer 1");
    assertEquals(reads, afterFirst);
    await weights.load(config, "layer.0", counted, "digest of layer 0");
    assertEquals(weights.keys(), ["digest of layer 1", "digest of layer 0"]);
    const both = weights.bytes;
    weights.keepOnly(new Set(["digest of layer 0"]));
    assertEquals(weights.keys(), ["digest of layer 0"]);
    assertEquals(weights.bytes, both / 2);
    weights.destroy();
    assertEquals(weights.bytes, 0);
  }));

Deno.test("a tensor of another shape than the config's is refused by name, and nothing stays", () =>
  withGpu(async (gpu) => {
    const tensors = randomModel(tinyConfig(), 9);
    const weights = new WeightStore(gpu);
    const other = tinyConfig({ hiddenSize: 32 });
    const load = () => weights.load(other, "layer.0", tensors);
    const error = await assertRejects(load, FleetError, "input_layernorm.weight has shape (64)");
    assertEquals([error.code, weights.bytes], ["bad-checkpoint", 0]);
  }));
