import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertLess,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import {
  checkpointFiles,
  floatBytes,
  randomTensors,
  TINY_CONFIG,
} from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { VirtualClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { randomInt, seededRandom } from "../shared/random.ts";
import { type CalibratedRun, type CalibratedSettings, quantizeCalibrated } from "./calibrated.ts";
import { batches, cutSequences } from "./calibration_text.ts";
import { parseFormat } from "./format.ts";
import { hessianBands } from "./capture.ts";
import { memoryWork } from "./work_files.ts";
import type { FileSink } from "./writer.ts";

const FORMAT = parseFormat("m1v4g16");
const SETTINGS: CalibratedSettings = {
  fitRounds: 1,
  fitSteps: 8,
  blockSteps: 2,
  sampleGroups: 32,
  modelSteps: 18,
  rates: { codebooks: 0.01, scales: 0.01, norms: 0.003, codes: 0.02 },
  nextTokenShare: 0.1,
  seed: 1,
  batchSequences: 2,
  blockSequences: 4,
  keep: [],
  maxShardBytes: 2 ** 20,
};

const random = seededRandom(8);
const TEXT = cutSequences(
  Uint16Array.from({ length: 16 * 12 }, () => randomInt(random, 64)),
  16,
  2,
  64,
);
const openTiny = () =>
  openCheckpoint(memorySource(checkpointFiles(TINY_CONFIG, randomTensors(TINY_CONFIG))));

async function withRun(
  work: (run: CalibratedRun, files: Map<string, Uint8Array<ArrayBuffer>>) => Promise<void>,
): Promise<void> {
  const gpu = await Gpu.open({ software: true, limits: "default" });
  try {
    const files = new Map<string, Uint8Array<ArrayBuffer>>();
    const run = { gpu, clock: new VirtualClock(), sink: memoryWork(files), work: memoryWork() };
    await work(run, files);
  } finally {
    gpu.close();
  }
}

Deno.test("calibration lowers every weighted error, and tuning the model its divergence", () =>
  withRun(async (run, files) => {
    // One batch of text, so that losses can be compared.
    const text = cutSequences(TEXT.ids.subarray(0, 2 * 16), 16, 2, 64);
    const report = await quantizeCalibrated(await openTiny(), FORMAT, text, SETTINGS, run);
    for (const { matrices, outputError } of report.blocks) {
      assertEquals(matrices.length, 7);
      for (const { name, errorBefore, errorAfter } of matrices) {
        assertLess(errorAfter, 0.9 * errorBefore, name);
      }
      assertLess(outputError, 0.5);
    }
    const losses = report.model!.losses;
    assertEquals(losses.map(({ step }) => step), [0, 16, 18]);
    assertEquals(report.model!.kept, 18);
    assertLess(losses.at(-1)!.divergence, 0.9 * losses[0].divergence);
    const result = await openCheckpoint(memorySource(Object.fromEntries(files)));
    assertEquals(result.config.codegemm, FORMAT);
    assertEquals(await run.work.list(), []);
    const norm = result.info("model.norm.weight");
    assert((await result.read(norm.name, 0, norm.bytes)).some((byte) => byte !== 0));
  }));

Deno.test("a run that was cut short, and then met a full disk, goes on where it stood and comes to the same bytes", async () => {
  const whole = new Map<string, Uint8Array>();
  const settings = { ...SETTINGS, modelSteps: 2 };
  await withRun(async (run, files) => {
    await quantizeCalibrated(await openTiny(), FORMAT, TEXT, settings, run);
    for (const [name, bytes] of files) whole.set(name, bytes);
  });
  await withRun(async (run, files) => {
    const stop = () => {
      throw new Error("power cut");
    };
    const cut = { ...run, onBlock: stop };
    // Blocks know nothing of model tuning: it may be asked for differently afterwards.
    const other = { ...settings, modelSteps: 3 };
    await assertRejects(
      async () => await quantizeCalibrated(await openTiny(), FORMAT, TEXT, other, cut),
      Error,
      "power cut",
    );
    const error = await assertRejects(
      async () =>
        await quantizeCalibrated(await openTiny(), FORMAT, TEXT, { ...settings, seed: 2 }, run),
      FleetError,
      "stopped half way",
    );
    assertEquals([error.code, files.size], ["disk", 0]);
    const done: number[] = [], steps: number[] = [];
    const again = {
      ...run,
      onBlock: (_: unknown, number: number) => done.push(number),
      onStep: (step: number) => steps.push(step),
    };
    const full: FileSink = {
      write: (name) => Promise.reject(new FleetError("disk", `Cannot write ${name}: disk full`)),
    };
    await assertRejects(
      async () =>
        await quantizeCalibrated(await openTiny(), FORMAT, TEXT, settings, {
          ...again,
          sink: full,
        }),
      FleetError,
      "Cannot write model-00001-of-00001.safetensors: disk full",
    );
    assertEquals([done, steps], [[2], [0, 2]]);
    await quantizeCalibrated(await openTiny(), FORMAT, TEXT, settings, again);
    // Neither a block nor a step was done twice.
    assertEquals([done, steps], [[2], [0, 2]]);
    assertEquals(files, whole);
  });
});

Deno.test("kept matrices stay as they are, beside tuned ones", () =>
  withRun(async (run, files) => {
    const settings = { ...SETTINGS, keep: ["layers.0", "mlp.down_proj"], modelSteps: 2 };
    const checkpoint = await openTiny();
    await quantizeCalibrated(checkpoint, FORMAT, TEXT, settings, run);
    const result = await openCheckpoint(memorySource(Object.fromEntries(files)));
    for (const name of ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]) {
      const { name: full, bytes } = result.info(`model.${name}.weight`);
      assertEquals(await result.read(full, 0, bytes), await checkpoint.read(full, 0, bytes));
    }
    assert(result.has("model.layers.1.mlp.up_proj.codes"));
  }));

Deno.test("a weight that is not finite is named before any block is begun", () =>
  withRun(async (run, files) => {
    const name = "model.layers.1.mlp.down_proj.weight";
    const tensors = randomTensors(TINY_CONFIG).map((tensor) =>
      tensor.name === name
        ? { ...tensor, data: floatBytes(new Float32Array(32 * 48).fill(Infinity, 7, 8), "F16") }
        : tensor
    );
    const damaged = await openCheckpoint(memorySource(checkpointFiles(TINY_CONFIG, tensors)));
    const error = await assertRejects(
      async () => await quantizeCalibrated(damaged, FORMAT, TEXT, SETTINGS, run),
      FleetError,
      `${name}: element 7`,
    );
    assertEquals([error.code, files.size], ["bad-checkpoint", 0]);
    assertEquals(await run.work.list(), []);
  }));

Deno.test("Hessians that no binding holds are cut into bands of whole groups", () => {
  assertEquals(hessianBands(28672, 128, 2 ** 31), [[0, 14336], [14336, 14336]]);
  assertEquals(hessianBands(8192, 128, 2 ** 31), [[0, 8192]]);
  assertEquals(hessianBands(80, 16, 40 * 80 * 4), [[0, 32], [32, 32], [64, 16]]);
});

Deno.test("cutting Hessians changes next to nothing", () =>
  withRun(async (run) => {
    const settings = { ...SETTINGS, keep: ["layers.1"], fitSteps: 2, blockSteps: 0, modelSteps: 0 };
    const errors = async (maxHessianBytes: number) => {
      const work = { ...run, sink: memoryWork(), work: memoryWork(), maxHessianBytes };
      const report = await quantizeCalibrated(await openTiny(), FORMAT, TEXT, settings, work);
      return report.blocks[0].matrices.map(({ errorAfter }) => errorAfter);
    };
    const whole = await errors(2 ** 20), cut = await errors(16 * 48 * 4);
    whole.forEach((error, i) => assertAlmostEquals(cut[i], error, 0.01 * error));
  }));

Deno.test("too little text, and text for another model, are refused", () => {
  const cut = (count: number, id: number) => () =>
    cutSequences(new Uint16Array(count).fill(id), 8, 3, 64);
  assertThrows(cut(23, 0), FleetError, "2 sequences of 8, 3 are needed");
  assertThrows(cut(24, 64), FleetError, "outside the model's vocabulary of 64");
  assertThrows(
    () => cutSequences(new Uint16Array(30), 10, 1, 64),
    FleetError,
    "give a multiple of 4",
  );
  assertEquals(cut(31, 63)().sequences, 3);
});

Deno.test("every sequence comes once a round, in an order that the seed decides", () => {
  const take = (seed: number) => {
    const source = batches(7, 3, seed);
    return Array.from({ length: 4 }, () => [...source.next().value as Uint32Array]);
  };
  const [a, b, c] = take(1);
  assertEquals(new Set([...a, ...b]).size, 6);
  assertEquals(take(1)[2], c);
  assert(JSON.stringify(take(2)) !== JSON.stringify(take(1)));
});
