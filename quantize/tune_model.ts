/**
 * The last stage of quantization: all layers are tuned together to predict what the float model
 * predicts, for models that fit on the GPU whole.
 *
 * Some of the text is held back. The model is judged on it as tuning goes on, and what counts in the
 * end is the best of what was seen, the untuned model included: tuning never makes it worse there.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import type { Clock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import type { CodeGemmFormat, ModelConfig } from "../shared/model_config.ts";
import { batches, type CalibrationText, gather, shuffled } from "./calibration_text.ts";
import { type ModelEnds, ModelRunner, ModelTuner, type TuneLoss } from "./gpu/model_tuner.ts";
import { Recorder } from "./gpu/operation.ts";
import type { LayerArrays, TuneRates } from "./gpu/tuned_layer.ts";
import { layerRates } from "./tune_rates.ts";
import {
  loadTuner,
  readProgress,
  type TunePoint,
  type TuningProgress,
  writeProgress,
} from "./tuning_files.ts";
import type { WorkFiles } from "./work_files.ts";

export type { TunePoint } from "./tuning_files.ts";

/** How a model is tuned. */
export interface ModelSettings {
  /** Steps; 0 leaves the model as its blocks were made. */
  modelSteps: number;
  /** Per step at the schedule's height, as a part of each layer's quantization error. */
  rates: TuneRates;
  /** Share of the next token in the loss; the rest is the float model's distribution. */
  nextTokenShare: number;
  seed: number;
}

/** What a model is tuned with. */
export interface ModelTask {
  config: ModelConfig;
  format: CodeGemmFormat;
  shape: { sequences: number; tokens: number };
  text: CalibrationText;
  ends: ModelEnds;
  /** The float layers. */
  teacher: readonly LayerArrays[];
  student: readonly LayerArrays[];
  /** For the float model's hidden states, and to go on after a stop. */
  work: WorkFiles;
  clock: Clock;
  /** Steps between two looks at the held-back sequences. */
  lookEvery?: number;
  onStep?(done: number, total: number, loss: TuneLoss): void;
}

/** A tuned model. */
export interface TunedModel {
  layers: LayerArrays[];
  finalNorm: Float32Array<ArrayBuffer>;
  /** Over the held-back sequences; the first is the untuned model's. */
  losses: TunePoint[];
  /** Steps after which it was best: it is that model. */
  kept: number;
}

const TEACHER = "teacher.f16";
const LOOK_EVERY = 16;
/** Time between two states on disk: they are several times as large as the model. */
const SAVE_EVERY_MS = 5 * 60_000;
/** Batches that are held back at most, and the share of the text that they may take. */
const HELD_BATCHES = 2, HELD_SHARE = 1 / 4;

/**
 * Tunes a model; see {@linkcode ModelSettings}. Goes on where the work files say that it stopped.
 *
 * @throws FleetError `gpu` when the losses are no numbers, `out-of-memory`, `disk`
 */
export async function tuneModel(
  gpu: Gpu,
  task: ModelTask,
  settings: ModelSettings,
): Promise<TunedModel> {
  const { work, shape, lookEvery = LOOK_EVERY } = task,
    { modelSteps, rates, nextTokenShare } = settings;
  const fingerprint = JSON.stringify([modelSteps, rates, nextTokenShare]);
  let progress = await readProgress(work);
  if (!progress) await teach(gpu, task);
  if (progress?.fingerprint !== fingerprint) {
    progress = { fingerprint, step: 0, losses: [], kept: 0, held: "nothing" };
    await writeProgress(work, progress);
  }
  const recorder = new Recorder(gpu);
  try {
    const tuner = await gpu.allocate(
      "tuning the whole model; pass --model-steps 0, or lower --batch",
      () =>
        ModelTuner.create(recorder, {
          ...task,
          layers: task.student,
          rates: layerRates(rates, task.teacher, task.student, task.format),
          share: nextTokenShare,
        }),
    );
    await loadTuner(work, progress, tuner);
    const run: Run = { task, settings, tuner, progress, savedMs: task.clock.nowMs() };
    const { training, held } = splitText(task.text.sequences, shape.sequences, settings.seed);
    const order = batches(training.length, shape.sequences, settings.seed);
    for (let t = 0; t < modelSteps; t++) {
      const chosen = order.next().value.map((i: number) => training[i]);
      if (t < progress.step) continue;
      if (t % lookEvery === 0) await look(run, held);
      const [tokens, teacher] = await batchOf(task, chosen);
      tuner.step(t, modelSteps, tokens, teacher);
      progress.step = t + 1;
      await recorder.pace();
    }
    await look(run, held);
    const { layers, finalNorm } = await tuner.arrays();
    gpu.check();
    return { layers, finalNorm, losses: progress.losses, kept: progress.kept };
  } finally {
    recorder.destroy();
  }
}

/**
 * Cuts the sequences into those that are learned from and whole batches of others. Blocks are fitted
 * on the first of the same order. A text too short to hold any back is judged on what is learned.
 */
export function splitText(
  sequences: number,
  batch: number,
  seed: number,
): { training: Uint32Array; held: Uint32Array[] } {
  const order = shuffled(sequences, seed);
  const count = Math.min(HELD_BATCHES, Math.floor(sequences / batch * HELD_SHARE));
  const first = sequences - count * batch;
  return {
    training: order.subarray(0, first),
    held: count === 0 ? [order.subarray(0, batch)] : Array.from(
      { length: count },
      (_, i) => order.subarray(first + i * batch, first + (i + 1) * batch),
    ),
  };
}

/** A tuning under way. */
interface Run {
  task: ModelTask;
  settings: ModelSettings;
  tuner: ModelTuner;
  progress: TuningProgress;
  /** When a state was last put on disk. */
  savedMs: number;
}

/** Judges the model, keeps it when it is the best so far, and puts the state on disk when it is time. */
async function look(run: Run, held: readonly Uint32Array[]): Promise<void> {
  const { task, tuner, progress, settings: { modelSteps, nextTokenShare } } = run;
  const { losses, step } = progress;
  if (losses.at(-1)?.step === step) return; // Looked at before the stop.
  const loss = { divergence: 0, nextToken: 0 };
  for (const chosen of held) {
    const { divergence, nextToken } = await tuner.judge(...await batchOf(task, chosen));
    loss.divergence += divergence / held.length;
    loss.nextToken += nextToken / held.length;
  }
  if (!Number.isFinite(loss.divergence)) {
    throw new FleetError(
      "gpu",
      `Model tuning lost its way by step ${step}: the divergence is no finite number; lower ` +
        "--code-rate, or pass --model-steps 0 (finished blocks are kept)",
    );
  }
  losses.push({ step, ...loss });
  const best = losses.find((point) => point.step === progress.kept)!;
  if (improves(loss, best, losses[0], nextTokenShare)) {
    progress.kept = step;
    tuner.keep();
  }
  task.onStep?.(step, modelSteps, loss);
  const nowMs = task.clock.nowMs(), done = step === modelSteps;
  if (!done && nowMs - run.savedMs < SAVE_EVERY_MS) return;
  run.savedMs = nowMs;
  progress.held = done ? "kept" : "all";
  await writeProgress(task.work, progress, tuner);
}

/** Whether a model is better than the best so far: of lower loss, and no farther from the float
 * model than the untuned one. */
function improves(loss: TuneLoss, best: TuneLoss, untuned: TuneLoss, share: number): boolean {
  const total = (point: TuneLoss) => share * point.nextToken + (1 - share) * point.divergence;
  return total(loss) < total(best) && loss.divergence <= untuned.divergence;
}

/** Tokens of chosen sequences, and the float model's hidden states of them. */
async function batchOf(
  { config, text, work }: ModelTask,
  chosen: Uint32Array,
): Promise<[tokens: Uint32Array, teacher: Uint32Array<ArrayBuffer>]> {
  const wordsEach = text.tokens * config.hiddenSize / 2;
  const teacher = new Uint32Array(chosen.length * wordsEach);
  for (let i = 0; i < chosen.length; i++) {
    const bytes = await work.read(TEACHER, chosen[i] * wordsEach * 4, wordsEach * 4);
    teacher.set(new Uint32Array(bytes.buffer), i * wordsEach);
  }
  return [gather(text, chosen), teacher];
}

/** Writes the float model's last hidden states of all sequences. */
async function teach(gpu: Gpu, task: ModelTask): Promise<void> {
  const { config, format, shape, text, teacher, ends, work } = task;
  const recorder = new Recorder(gpu);
  try {
    const runner = await gpu.allocate(
      "the float model; pass --model-steps 0",
      () => ModelRunner.create(recorder, config, format, shape, teacher, ends),
    );
    const wordsEach = text.tokens * config.hiddenSize / 2;
    for (let first = 0; first < text.sequences; first += shape.sequences) {
      // The last batch is filled up from the front, so that all have one size.
      const start = Math.min(first, text.sequences - shape.sequences);
      const chosen = Array.from({ length: shape.sequences }, (_, i) => start + i);
      const words = await runner.run(gather(text, chosen));
      await work.write(TEACHER, start * wordsEach * 4, new Uint8Array(words.buffer));
    }
  } finally {
    recorder.destroy();
  }
}
