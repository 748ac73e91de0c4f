/**
 * Quantization with a calibration text: block by block, each finished one kept on disk, then all of
 * them together, then the checkpoint.
 *
 * Memory is bounded by one block: activations between blocks lie in work files, and so do finished
 * blocks. A run that was cut short goes on at the block where it stopped.
 *
 * @module
 */
import { type Checkpoint, formatName } from "../shared/checkpoint/mod.ts";
import type { Clock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { type CodeGemmFormat, LINEAR_NAMES, type LinearName } from "../shared/model_config.ts";
import { seededRandom } from "../shared/random.ts";
import type { Gpu } from "../kernels/gpu.ts";
import { f16Bytes, layerBytes, readBlock, readBlockBytes, writeBlock } from "./block_files.ts";
import { blockBatches, type CalibrationText, gather, shuffled } from "./calibration_text.ts";
import { checkWeights, type OnCheck, readEnds, readLayer, storedFloat16 } from "./float_layers.ts";
import { heldMemory } from "./gpu/operation.ts";
import type { LayerArrays } from "./gpu/tuned_layer.ts";
import {
  copyFiles,
  type PlannedTensors,
  planTensors,
  quantizedConfig,
  writeText,
} from "./output.ts";
import { type Phase, Stopwatch } from "./phases.ts";
import { type BlockReport, type BlockSettings, quantizeBlock } from "./quantize_block.ts";
import type { Activations } from "./stage.ts";
import { type ModelSettings, tuneModel, type TunePoint } from "./tune_model.ts";
import type { WorkFiles } from "./work_files.ts";
import { createShardWriter, type FileSink } from "./writer.ts";

/** How a checkpoint is quantized with a calibration text. */
export interface CalibratedSettings extends BlockSettings, ModelSettings {
  /** Sequences that go through the GPU together. */
  batchSequences: number;
  /** Sequences that blocks are fitted and tuned on; model tuning takes all of the text. */
  blockSequences: number;
  keep: readonly string[];
  fallback?: "float16";
  maxShardBytes: number;
}

/** What became of a checkpoint; `quantization.json` holds it. */
export interface CalibratedReport {
  format: string;
  settings: CalibratedSettings;
  calibration: { tokens: number; sequenceTokens: number; sha256: string };
  adapter: string;
  /** Of the whole run; where it went on after a stop, of what was left. */
  seconds: number;
  /** Of looking through all weights before the first block, and of writing the checkpoint. */
  checkSeconds: number;
  writeSeconds: number;
  /** GPU buffers at their most. */
  gpuPeakBytes: number;
  blocks: TimedReport[];
  /** How model tuning went on over the sequences it held back, and the step that it kept. */
  model: { losses: TunePoint[]; kept: number; seconds: number } | null;
}

/** What became of a block, and how long each of its phases took. */
export interface TimedReport extends BlockReport {
  seconds: number;
  phases: Record<Phase, number>;
}

/** What a run takes beside its settings. */
export interface CalibratedRun {
  gpu: Gpu;
  clock: Clock;
  sink: FileSink;
  work: WorkFiles;
  /** Hessians that take more are cut into bands; by default what the GPU can bind. */
  maxHessianBytes?: number;
  onCheck?: OnCheck;
  onBlock?(report: TimedReport, done: number, total: number): void;
  /** Something within a block is finished. */
  onPart?(layer: number, what: string, seconds: number): void;
  onStep?(done: number, total: number, divergence: number): void;
}

const STATE = "state.json";

/** How far a run has come; written last, in one piece, after each block. */
interface State {
  /** Of everything that decides the result: a run goes on only where it is the same. */
  fingerprint: string;
  blocks: TimedReport[];
}

/**
 * Quantizes a float checkpoint with a calibration text.
 *
 * @throws FleetError `bad-checkpoint` (shapes, values that are not finite), `bad-usage` (nothing to
 *   quantize, too little text), `disk` (work files of another run, disk full), `out-of-memory`, `gpu`
 */
export async function quantizeCalibrated(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  text: CalibrationText,
  settings: CalibratedSettings,
  run: CalibratedRun,
): Promise<CalibratedReport> {
  const { gpu, clock, work } = run;
  const plan = planTensors(checkpoint, format, settings.keep, settings.fallback);
  const quantized = new Set(
    plan.flatMap((item) => item.type === "quantize" ? [item.matrix] : []),
  );
  const startMs = clock.nowMs();
  const sha256 = await digest(new Uint8Array(text.ids.slice().buffer));
  // Model tuning comes after the blocks; a run may go on with other settings of it.
  const { modelSteps: _steps, rates: _rates, nextTokenShare: _share, ...ofBlocks } = settings;
  const fingerprint = await digest(new TextEncoder().encode(JSON.stringify([
    formatName(format),
    ofBlocks,
    sha256,
    text.tokens,
    checkpoint.configJson,
    checkpoint.names().map((name) => checkpoint.info(name)),
  ])));
  const state = await readState(work, fingerprint);
  const job: Job = {
    checkpoint,
    format,
    text,
    settings,
    run,
    plan,
    shape: { sequences: settings.batchSequences, tokens: text.tokens },
    kept: (layer) =>
      new Set(LINEAR_NAMES.filter((name) => !quantized.has(`model.layers.${layer}.${name}`))),
  };
  const checkSeconds = await quantizeBlocks(job, state);
  const tuned = settings.modelSteps > 0 ? await tuneWhole(job) : null;
  const report: CalibratedReport = {
    format: formatName(format),
    settings,
    calibration: { tokens: text.ids.length, sequenceTokens: text.tokens, sha256 },
    adapter: gpu.info.name,
    seconds: (clock.nowMs() - startMs) / 1000,
    checkSeconds,
    writeSeconds: 0,
    gpuPeakBytes: heldMemory(gpu).peakBytes,
    blocks: state.blocks,
    model: tuned && { losses: tuned.losses, kept: tuned.kept, seconds: tuned.seconds },
  };
  await writeCheckpoint(
    checkpoint,
    format,
    plan,
    report,
    run,
    (layer) =>
      tuned
        ? Promise.resolve(layerBytes(tuned.layers[layer], layer, checkpoint.config, format))
        : readBlockBytes(work, layer),
    tuned?.finalNorm ?? null,
  );
  await work.clear();
  return report;
}

/** One run, with what follows from its arguments. */
interface Job {
  checkpoint: Checkpoint;
  format: CodeGemmFormat;
  text: CalibrationText;
  settings: CalibratedSettings;
  run: CalibratedRun;
  plan: readonly PlannedTensors[];
  shape: { sequences: number; tokens: number };
  /** Matrices of a layer that stay float16. */
  kept(layer: number): ReadonlySet<LinearName>;
}

/**
 * Quantizes the blocks that are not finished yet; each is kept before the next is begun.
 *
 * @returns seconds of looking through all weights, before the first block
 */
async function quantizeBlocks(job: Job, state: State): Promise<number> {
  const { checkpoint, format, text, settings, run, plan, shape } = job;
  const { config } = checkpoint, { gpu, clock, work } = run;
  const batches = blockBatches(settings, text.sequences);
  const startMs = clock.nowMs();
  let checkSeconds = 0;
  if (state.blocks.length === 0) {
    // All of it now, not after hours of work.
    await checkWeights(checkpoint, plan, run.onCheck);
    const chosen = shuffled(text.sequences, settings.seed).subarray(0, batches * shape.sequences);
    await embed(checkpoint, gather(text, chosen), shape, work);
    checkSeconds = (clock.nowMs() - startMs) / 1000;
  }
  const words = shape.sequences * shape.tokens * config.hiddenSize / 2;
  const streams = (layer: number) => ({
    float: activations(work, `float-${layer}.f16`, words),
    quantized: activations(work, `quantized-${layer}.f16`, words),
  });
  for (let layer = state.blocks.length; layer < config.layers; layer++) {
    const blockMs = clock.nowMs();
    const watch = new Stopwatch(clock, (what, seconds) => run.onPart?.(layer, what, seconds));
    const floats = await readLayer(checkpoint, layer);
    watch.lap("read");
    watch.tell("weights");
    const made = await quantizeBlock(
      gpu,
      {
        config,
        format,
        shape,
        layer: floats,
        kept: job.kept(layer),
        inputs: streams(layer),
        outputs: streams(layer + 1),
        batches,
        maxHessianBytes: run.maxHessianBytes ?? gpu.limits.maxStorageBufferBindingSize,
      },
      settings,
      seededRandom(settings.seed * 2 ** 20 + layer),
      watch,
    );
    if (!Number.isFinite(made.report.outputError)) {
      throw new FleetError("gpu", `Layer ${layer} came out with numbers that are not finite`);
    }
    await writeBlock(work, layer, made.layer, config, format);
    for (const which of ["float", "quantized"]) await work.sync(`${which}-${layer + 1}.f16`);
    watch.lap("write");
    state.blocks.push({
      ...made.report,
      seconds: (clock.nowMs() - blockMs) / 1000,
      phases: watch.seconds,
    });
    await writeState(work, state);
    for (const which of ["float", "quantized"]) await work.remove(`${which}-${layer}.f16`);
    run.onBlock?.(state.blocks.at(-1)!, layer + 1, config.layers);
  }
  return checkSeconds;
}

/** Tunes all finished blocks together. */
async function tuneWhole(job: Job) {
  const { checkpoint, format, text, settings, run, shape } = job;
  const startMs = run.clock.nowMs();
  const teacher: LayerArrays[] = [], student: LayerArrays[] = [];
  for (let layer = 0; layer < checkpoint.config.layers; layer++) {
    const float = await readLayer(checkpoint, layer);
    teacher.push(float);
    student.push(await finished(job, layer, float));
  }
  const result = await tuneModel(run.gpu, {
    config: checkpoint.config,
    format,
    shape,
    text,
    ends: await readEnds(checkpoint),
    teacher,
    student,
    work: run.work,
    clock: run.clock,
    onStep: (done, total, { divergence }) => run.onStep?.(done, total, divergence),
  }, settings);
  return { ...result, seconds: (run.clock.nowMs() - startMs) / 1000 };
}

/** A finished block, with the float matrices that it keeps. */
function finished(
  { checkpoint, format, run, kept }: Job,
  layer: number,
  float: LayerArrays,
): Promise<LayerArrays> {
  return readBlock(run.work, layer, float, kept(layer), checkpoint.config, format);
}

/** Writes the result: tuned layers, what was kept, the report, and the files beside them. */
async function writeCheckpoint(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  plan: readonly PlannedTensors[],
  report: CalibratedReport,
  { clock, sink }: CalibratedRun,
  bytesOf: (layer: number) => Promise<Record<string, Uint8Array>>,
  finalNorm: Float32Array | null,
): Promise<void> {
  const startMs = clock.nowMs();
  const writer = await createShardWriter(
    sink,
    plan.flatMap((item) => item.tensors),
    report.settings.maxShardBytes,
  );
  const layers = new Map<number, Record<string, Uint8Array>>();
  for (const item of plan) {
    for (const { name } of item.tensors) {
      const layer = Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1);
      if (layer >= 0 && !layers.has(layer)) {
        layers.clear(); // One block in memory at a time.
        layers.set(layer, await bytesOf(layer));
      }
      const made = layer >= 0
        ? layers.get(layer)![name]
        : name === "model.norm.weight" && finalNorm
        ? f16Bytes(finalNorm)
        : undefined;
      await writer.write(name, made ?? await storedFloat16(checkpoint, name));
    }
  }
  report.writeSeconds = (clock.nowMs() - startMs) / 1000;
  report.seconds += report.writeSeconds;
  await writeText(sink, "quantization.json", JSON.stringify(report, null, 2) + "\n");
  await copyFiles(checkpoint, sink);
  await writeText(sink, "config.json", quantizedConfig(checkpoint.configJson, format));
  await writer.finish();
}

async function digest(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex();
}

async function readState(work: WorkFiles, fingerprint: string): Promise<State> {
  if (!(await work.list()).includes(STATE)) return { fingerprint, blocks: [] };
  const bytes = await work.read(STATE, 0, await work.size(STATE));
  const state = JSON.parse(new TextDecoder().decode(bytes)) as State;
  if (state.fingerprint !== fingerprint) {
    throw new FleetError(
      "disk",
      "The output directory holds a quantization that stopped half way, of another checkpoint, " +
        "text or setting; give the same flags to go on with it, or remove the directory",
    );
  }
  return state;
}

async function writeState(work: WorkFiles, state: State): Promise<void> {
  await work.remove(`${STATE}.new`);
  await work.write(`${STATE}.new`, 0, new TextEncoder().encode(JSON.stringify(state)));
  await work.sync(`${STATE}.new`);
  await work.rename(`${STATE}.new`, STATE);
}

/** A file of activations; a batch is `words` long. */
function activations(work: WorkFiles, name: string, words: number): Activations {
  return {
    async read(batch) {
      return new Uint32Array((await work.read(name, batch * words * 4, words * 4)).buffer);
    },
    write: (batch, data) => work.write(name, batch * words * 4, new Uint8Array(data.buffer)),
  };
}

/** Writes the embedded text as the first layer's input, for both streams. */
async function embed(
  checkpoint: Checkpoint,
  ids: Uint32Array,
  { sequences, tokens }: { sequences: number; tokens: number },
  work: WorkFiles,
): Promise<void> {
  const { hiddenSize } = checkpoint.config;
  const table = new Uint16Array(
    (await storedFloat16(checkpoint, "model.embed_tokens.weight")).buffer,
  );
  const rows = sequences * tokens;
  for (let first = 0; first < ids.length; first += rows) {
    const batch = new Uint16Array(rows * hiddenSize);
    for (let row = 0; row < rows; row++) {
      const id = ids[first + row];
      batch.set(table.subarray(id * hiddenSize, (id + 1) * hiddenSize), row * hiddenSize);
    }
    for (const which of ["float", "quantized"]) {
      await work.write(`${which}-0.f16`, first * hiddenSize * 2, new Uint8Array(batch.buffer));
    }
  }
}
