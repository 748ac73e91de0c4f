/**
 * The last stage of quantization: all layers are tuned together to predict what the float model
 * predicts, for models that fit on the GPU whole.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import { FleetError } from "../shared/errors.ts";
import type { CodeGemmFormat, ModelConfig } from "../shared/model_config.ts";
import { batches, type CalibrationText, gather } from "./calibration_text.ts";
import { type ModelEnds, ModelRunner, ModelTuner, type TuneLoss } from "./gpu/model_tuner.ts";
import { Recorder } from "./gpu/operation.ts";
import type { LayerArrays, TuneRates } from "./gpu/tuned_layer.ts";
import type { WorkFiles } from "./work_files.ts";

/** How a model is tuned. */
export interface ModelSettings {
  /** Steps; 0 leaves the model as its blocks were made. */
  modelSteps: number;
  /** Rates relative to the size of what is tuned. */
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
  /** For the float model's hidden states. */
  work: WorkFiles;
  onStep?(done: number, total: number, loss: TuneLoss): void;
}

/** Losses, averaged over the steps since the one before. */
export interface TunePoint extends TuneLoss {
  step: number;
}

const TEACHER = "teacher.f16";
/** Steps between two looks at the loss. */
const LOOK_EVERY = 16;

/** Tunes a model; see {@linkcode ModelSettings}. */
export async function tuneModel(
  gpu: Gpu,
  task: ModelTask,
  settings: ModelSettings,
): Promise<
  { layers: LayerArrays[]; finalNorm: Float32Array<ArrayBuffer>; losses: TunePoint[] }
> {
  await teach(gpu, task);
  const { config, format, shape, text, student, ends, work } = task;
  const recorder = new Recorder(gpu);
  try {
    const tuner = await gpu.allocate(
      "tuning the whole model; pass --model-steps 0, or lower --batch",
      () =>
        ModelTuner.create(
          recorder,
          config,
          format,
          shape,
          student,
          ends,
          settings.rates,
          settings.nextTokenShare,
        ),
    );
    const wordsEach = text.tokens * config.hiddenSize / 2;
    const losses: TunePoint[] = [];
    const order = batches(text.sequences, shape.sequences, settings.seed);
    for (let t = 0; t < settings.modelSteps; t++) {
      const chosen = order.next().value;
      const teacher = new Uint32Array(chosen.length * wordsEach);
      for (let i = 0; i < chosen.length; i++) {
        const bytes = await work.read(TEACHER, chosen[i] * wordsEach * 4, wordsEach * 4);
        teacher.set(new Uint32Array(bytes.buffer), i * wordsEach);
      }
      tuner.step(t, settings.modelSteps, gather(text, chosen), teacher);
      if (t % LOOK_EVERY === 0 || t === settings.modelSteps - 1) {
        const loss = await tuner.loss();
        if (!Number.isFinite(loss.divergence)) {
          throw new FleetError(
            "gpu",
            `Model tuning lost its way at step ${
              t + 1
            }: the divergence is no finite number; lower ` +
              "--code-rate, or pass --model-steps 0 (finished blocks are kept)",
          );
        }
        losses.push({ step: t + 1, ...loss });
        task.onStep?.(t + 1, settings.modelSteps, loss);
      }
    }
    const { layers, finalNorm } = await tuner.arrays();
    gpu.check();
    await work.remove(TEACHER);
    return { layers, finalNorm, losses };
  } finally {
    recorder.destroy();
  }
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
