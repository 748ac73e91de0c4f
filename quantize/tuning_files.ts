/**
 * Model tuning as far as it has come, in work files: a run that was cut short goes on with the same
 * numbers.
 *
 * @module
 */
import type { ModelTuner, TuneLoss } from "./gpu/model_tuner.ts";
import type { WorkFiles } from "./work_files.ts";

/** Losses over the held-back sequences after so many steps. */
export interface TunePoint extends TuneLoss {
  step: number;
}

/** How far tuning has come. */
export interface TuningProgress {
  /** Of the settings; a run goes on only where they are the same. */
  fingerprint: string;
  /** Steps that were taken. */
  step: number;
  losses: TunePoint[];
  /** The step whose model is the best so far; 0 is the model as its blocks were made. */
  kept: number;
  /** What the file beside it holds of the model; nothing before the first step. */
  held: "nothing" | "kept" | "all";
}

const PROGRESS = "tuning.json";
const modelFile = (step: number) => `tuning-${step}.bin`;

/** The progress of an earlier run, null where there is none. */
export async function readProgress(work: WorkFiles): Promise<TuningProgress | null> {
  if (!(await work.list()).includes(PROGRESS)) return null;
  const bytes = await work.read(PROGRESS, 0, await work.size(PROGRESS));
  return JSON.parse(new TextDecoder().decode(bytes));
}

/**
 * Puts progress on disk: the model first, then the words that make it count, so that a crash leaves
 * the old state or the new one. Then what came before is removed.
 */
export async function writeProgress(
  work: WorkFiles,
  progress: TuningProgress,
  tuner?: ModelTuner,
): Promise<void> {
  const { step, held } = progress, file = modelFile(step);
  if (tuner && held !== "nothing") {
    await work.remove(file);
    let offset = 0;
    await tuner.save(held, async (bytes) => {
      await work.write(file, offset, bytes);
      offset += bytes.length;
    });
    await work.sync(file);
  }
  await work.remove(`${PROGRESS}.new`);
  await work.write(`${PROGRESS}.new`, 0, new TextEncoder().encode(JSON.stringify(progress)));
  await work.sync(`${PROGRESS}.new`);
  await work.rename(`${PROGRESS}.new`, PROGRESS);
  for (const name of await work.list()) {
    if (/^tuning-\d+\.bin$/.test(name) && name !== file) await work.remove(name);
  }
}

/** Puts a tuner where {@linkcode writeProgress} found it. */
export async function loadTuner(
  work: WorkFiles,
  { step, held }: TuningProgress,
  tuner: ModelTuner,
): Promise<void> {
  if (held === "nothing") return;
  let offset = 0;
  await tuner.load(held, async (count) => {
    const bytes = await work.read(modelFile(step), offset, count);
    offset += count;
    return bytes;
  });
}
