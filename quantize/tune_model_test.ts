import { assert, assertEquals, assertLess, assertRejects } from "@std/assert";
import { Gpu } from "../kernels/gpu.ts";
import { checkpointFiles, randomTensors, TINY_CONFIG } from "../shared/checkpoint/fixture.ts";
import { memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { VirtualClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { type CodeGemmFormat, LINEAR_NAMES } from "../shared/model_config.ts";
import { gaussian, randomInt, seededRandom } from "../shared/random.ts";
import { cutSequences } from "./calibration_text.ts";
import { encodeGroups, trainCodebooks } from "./codebooks.ts";
import { readEnds, readLayer } from "./float_layers.ts";
import type { LayerArrays } from "./gpu/tuned_layer.ts";
import { type ModelSettings, type ModelTask, splitText, tuneModel } from "./tune_model.ts";
import { memoryWork, type WorkFiles } from "./work_files.ts";

const SETTINGS: ModelSettings = {
  modelSteps: 8,
  rates: { codebooks: 0.03, scales: 0.03, norms: 0.01, codes: 0.2 },
  nextTokenShare: 0,
  seed: 1,
};
const TOKENS = 12, SEQUENCES = 24, BATCH = 4;

/** A layer as plain k-means over numbers of the same kind leaves it. */
function coded(layer: LayerArrays, format: CodeGemmFormat): LayerArrays {
  const random = seededRandom(5);
  const sample = Float32Array.from({ length: 4096 }, () => gaussian(random));
  const codebooks = trainCodebooks(sample, format, { rounds: 2 }, random);
  const matrices = {} as LayerArrays["matrices"];
  for (const name of LINEAR_NAMES) {
    const { codes, scales } = encodeGroups(
      layer.matrices[name] as Float32Array<ArrayBuffer>,
      codebooks,
      format,
    );
    matrices[name] = {
      codes: Uint32Array.from(codes),
      codebooks: codebooks.slice(),
      scales: Float32Array.from(scales),
    };
  }
  return { matrices, norms: layer.norms };
}

/** A random model, its quantized form and a random text. */
async function taskOf(gpu: Gpu, format: CodeGemmFormat) {
  const config = { ...TINY_CONFIG, num_hidden_layers: 1 };
  const checkpoint = await openCheckpoint(
    memorySource(checkpointFiles(config, randomTensors(config))),
  );
  const teacher: LayerArrays[] = [await readLayer(checkpoint, 0)];
  const student = teacher.map((layer) => coded(layer, format));
  const random = seededRandom(9);
  const ids = Uint16Array.from({ length: TOKENS * SEQUENCES }, () => randomInt(random, 64));
  const task: Omit<ModelTask, "work" | "clock"> = {
    config: checkpoint.config,
    format,
    shape: { sequences: BATCH, tokens: TOKENS },
    text: cutSequences(ids, TOKENS, BATCH, 64),
    ends: await readEnds(checkpoint),
    teacher,
    student,
    lookEvery: 4,
  };
  return (more: Partial<ModelTask> = {}, settings: Partial<ModelSettings> = {}) =>
    tuneModel(gpu, { ...task, work: memoryWork(), clock: new VirtualClock(), ...more }, {
      ...SETTINGS,
      ...settings,
    });
}

/** Time flies: what is put on disk once in five minutes is put there at each look. */
class SlowClock extends VirtualClock {
  override nowMs(): number {
    this.advance(5 * 60_000);
    return super.nowMs();
  }
}

const openGpu = () => Gpu.open({ software: true, limits: "default" });

Deno.test("tuning brings two bits and four nearer to the float model at the same settings", async () => {
  const gpu = await openGpu();
  try {
    for (const format of [{ m: 1, v: 4, g: 16, b: 8 }, { m: 2, v: 4, g: 16, b: 8 }]) {
      const { losses, kept } = await (await taskOf(gpu, format))();
      assertEquals(losses.map(({ step }) => step), [0, 4, 8]);
      assertEquals(kept, 8);
      assertLess(losses[2].divergence, 0.97 * losses[0].divergence, `m = ${format.m}`);
    }
  } finally {
    gpu.close();
  }
});

Deno.test("what tuning makes worse is not kept: the model stays as its blocks were made", async () => {
  const gpu = await openGpu();
  try {
    const format = { m: 1, v: 4, g: 16, b: 8 };
    const tune = await taskOf(gpu, format);
    const rates = { codebooks: 3, scales: 3, norms: 3, codes: 3 };
    const wild = await tune({}, { rates, modelSteps: 3 });
    assertEquals(wild.kept, 0);
    assertLess(wild.losses[0].divergence, wild.losses[1].divergence);
    const untouched = await tune({}, { modelSteps: 0 });
    assertEquals(wild.layers, untouched.layers);
    assertEquals(wild.finalNorm, untouched.finalNorm);

    // Random tokens are nothing like what a random model predicts: learning them leads away from it.
    const share = { nextTokenShare: 1, rates: { ...SETTINGS.rates, norms: 0.2 } };
    const { losses, kept } = await tune({}, share);
    const start = losses[0], best = losses.find(({ step }) => step === kept)!;
    assert(losses.some(({ divergence }) => divergence > start.divergence));
    assert(best.divergence <= start.divergence);
  } finally {
    gpu.close();
  }
});

Deno.test("tuning that was cut short goes on from its last state and comes to the same numbers", async () => {
  const gpu = await openGpu();
  try {
    const tune = await taskOf(gpu, { m: 2, v: 4, g: 16, b: 8 });
    const settings = { modelSteps: 10 };
    const whole = await tune({}, settings);
    const work = memoryWork(), steps: number[] = [];
    const cut = (at: number) =>
      assertRejects(
        () =>
          tune({
            work,
            clock: new SlowClock(),
            onStep(done) {
              steps.push(done);
              if (done === at) throw new Error("power cut");
            },
          }, settings),
        Error,
        "power cut",
      );
    await cut(0); // The float model's states are there, and nothing else.
    await cut(8); // The state of step 4 is there.
    assertEquals(
      (await work.list()).filter((name) => name.startsWith("tuning")).sort(),
      ["tuning-4.bin", "tuning.json"],
    );
    const states = work.write;
    work.write = (name, offset, bytes) => {
      assert(name !== "teacher.f16", "the float model is not run again");
      return states(name, offset, bytes);
    };
    const onStep = (done: number) => void steps.push(done);
    const rest = await tune({ work, onStep }, settings);
    assertEquals(steps, [0, 0, 4, 8, 8, 10]);
    assertEquals(rest, whole);
    // The end is kept too, until the checkpoint is written.
    assertEquals(await tune({ work, onStep }, settings), whole);
    assertEquals(steps.length, 6);
    // Other settings begin anew, on the same float model.
    const { losses } = await tune({ work }, { modelSteps: 2 });
    assertEquals(losses.map(({ step }) => step), [0, 2]);
  } finally {
    gpu.close();
  }
});

Deno.test("a disk that fills up while a state is written leaves the state before", async () => {
  const gpu = await openGpu();
  try {
    const tune = await taskOf(gpu, { m: 1, v: 4, g: 16, b: 8 });
    const whole = await tune();
    const work = memoryWork();
    const full: WorkFiles = {
      ...work,
      write(name, offset, bytes) {
        if (name !== "tuning-8.bin" || offset === 0) return work.write(name, offset, bytes);
        const error = new FleetError("disk", `Cannot write out/.quantize/${name}: no space left`);
        return Promise.reject(error);
      },
    };
    const error = await assertRejects(
      () => tune({ work: full, clock: new SlowClock() }),
      FleetError,
      "tuning-8.bin: no space left",
    );
    assertEquals(error.code, "disk");
    const steps: number[] = [];
    const rest = await tune({ work, onStep: (done) => void steps.push(done) });
    assertEquals(steps, [8]);
    assertEquals(rest, whole);
  } finally {
    gpu.close();
  }
});

Deno.test("held-back sequences are whole batches that nothing is learned from", () => {
  const { training, held } = splitText(64, 4, 1);
  assertEquals([training.length, held.map((batch) => batch.length)], [56, [4, 4]]);
  assertEquals(new Set([...training, ...held.flatMap((batch) => [...batch])]).size, 64);
  assertEquals(splitText(17, 4, 1).held.length, 1);
  // Too little text: judged on what is learned.
  const short = splitText(6, 2, 1);
  assertEquals([short.training.length, short.held.length], [6, 1]);
});
