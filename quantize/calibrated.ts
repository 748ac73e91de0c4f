/**
 * Quantization with a calibration text: block by block, each finished one kept on disk, then all of
 * them together, then the checkpoint.
 *
 * Memory is bounded by one block: activations between blocks lie in work files, and so do finished
 * blocks. A run that was cut short goes on at the block where it stopped.
 *
 * @module
 */
import {
  assertFinite,
  type Checkpoint,
  encodeSafetensors,
  formatName,
  readHeader,
  toFloat16,
  toFloat32,
} from "../shared/checkpoint/mod.ts";
import type { Clock } from "../shared/clock.ts";
import { FleetError, invariant } from "../shared/errors.ts";
import {
  type CodeGemmFormat,
  LINEAR_NAMES,
  type LinearName,
  linearShape,
  type ModelConfig,
} from "../shared/model_config.ts";
import { seededRandom } from "../shared/random.ts";
import type { Gpu } from "../kernels/gpu.ts";
import { type CalibrationText, gather, shuffled } from "./calibration_text.ts";
import type { LayerArrays } from "./gpu/tuned_layer.ts";
import type { ModelEnds } from "./gpu/model_tuner.ts";
import { fromStored, toStored } from "./layout.ts";
import { copyFiles, planTensors, quantizedConfig, writeText } from "./output.ts";
import {
  type Activations,
  type BlockReport,
  type BlockSettings,
  quantizeBlock,
} from "./quantize_block.ts";
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
  seconds: number;
  blocks: (BlockReport & { seconds: number })[];
  /** Mean divergence from the float model and loss of the next token, as model tuning went on. */
  model: { losses: TunePoint[]; seconds: number } | null;
}

/** What a run takes beside its settings. */
export interface CalibratedRun {
  gpu: Gpu;
  clock: Clock;
  sink: FileSink;
  work: WorkFiles;
  onBlock?(report: BlockReport & { seconds: number }, done: number, total: number): void;
  onStep?(done: number, total: number, divergence: number): void;
}

const STATE = "state.json";
const blockFile = (layer: number) => `block-${layer}.safetensors`;

/** How far a run has come; written last, in one piece, after each block. */
interface State {
  /** Of everything that decides the result: a run goes on only where it is the same. */
  fingerprint: string;
  blocks: (BlockReport & { seconds: number })[];
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
  const { gpu, clock, work } = run, { config } = checkpoint;
  if (config.codegemm) {
    throw new FleetError("bad-usage", "The checkpoint is in CodeGEMM format already");
  }
  const plan = planTensors(checkpoint, format, settings.keep, settings.fallback);
  const quantized = new Set(
    plan.flatMap((item) => item.type === "quantize" ? [item.matrix] : []),
  );
  if (quantized.size === 0) {
    throw new FleetError("bad-usage", "--keep leaves no matrix to quantize");
  }
  const startMs = clock.nowMs();
  const sha256 = await digest(new Uint8Array(text.ids.slice().buffer));
  const fingerprint = await digest(new TextEncoder().encode(JSON.stringify([
    formatName(format),
    settings,
    sha256,
    text.tokens,
    checkpoint.configJson,
    checkpoint.names().map((name) => checkpoint.info(name)),
  ])));
  const state = await readState(work, fingerprint);
  const shape = { sequences: settings.batchSequences, tokens: text.tokens };
  const blockBatches = Math.floor(
    Math.min(settings.blockSequences, text.sequences) / shape.sequences,
  );
  invariant(blockBatches > 0, "the text was cut for at least one batch");
  if (state.blocks.length === 0) {
    // All of it now, not after hours of work.
    for (const { source } of plan) await storedFloat16(checkpoint, source);
    const chosen = shuffled(text.sequences, settings.seed).subarray(
      0,
      blockBatches * shape.sequences,
    );
    await embed(checkpoint, gather(text, chosen), shape, work);
  }
  const kept = (layer: number) =>
    new Set(LINEAR_NAMES.filter((name) => !quantized.has(`model.layers.${layer}.${name}`)));

  for (let layer = state.blocks.length; layer < config.layers; layer++) {
    const blockMs = clock.nowMs();
    const stream = (which: "float" | "quantized", at: number) =>
      activations(
        work,
        `${which}-${at}.f16`,
        shape.sequences * shape.tokens * config.hiddenSize / 2,
      );
    const made = await quantizeBlock(
      gpu,
      {
        config,
        format,
        shape,
        layer: await readLayer(checkpoint, layer),
        kept: kept(layer),
        inputs: { float: stream("float", layer), quantized: stream("quantized", layer) },
        outputs: { float: stream("float", layer + 1), quantized: stream("quantized", layer + 1) },
        batches: blockBatches,
      },
      settings,
      seededRandom(settings.seed * 2 ** 20 + layer),
    );
    if (!Number.isFinite(made.report.outputError)) {
      throw new FleetError("gpu", `Layer ${layer} came out with numbers that are not finite`);
    }
    await writeBlock(work, layer, made.layer, config, format);
    state.blocks.push({ ...made.report, seconds: (clock.nowMs() - blockMs) / 1000 });
    await writeState(work, state);
    for (const which of ["float", "quantized"]) await work.remove(`${which}-${layer}.f16`);
    run.onBlock?.(state.blocks.at(-1)!, layer + 1, config.layers);
  }

  let model: CalibratedReport["model"] = null;
  let tuned: { layers: LayerArrays[]; finalNorm: Float32Array } | null = null;
  if (settings.modelSteps > 0) {
    const modelMs = clock.nowMs();
    const ends = await readEnds(checkpoint);
    const teacher: LayerArrays[] = [], student: LayerArrays[] = [];
    for (let layer = 0; layer < config.layers; layer++) {
      const float = await readLayer(checkpoint, layer);
      teacher.push(float);
      student.push(await readBlock(work, layer, float, kept(layer), config, format));
    }
    const result = await tuneModel(gpu, {
      config,
      format,
      shape,
      text,
      ends,
      teacher,
      student,
      work,
      onStep: (done, total, { divergence }) => run.onStep?.(done, total, divergence),
    }, settings);
    tuned = result;
    model = { losses: result.losses, seconds: (clock.nowMs() - modelMs) / 1000 };
  }
  const report: CalibratedReport = {
    format: formatName(format),
    settings,
    calibration: { tokens: text.ids.length, sequenceTokens: text.tokens, sha256 },
    adapter: gpu.info.name,
    seconds: (clock.nowMs() - startMs) / 1000,
    blocks: state.blocks,
    model,
  };
  const writer = await createShardWriter(
    run.sink,
    plan.flatMap((item) => item.tensors),
    settings.maxShardBytes,
  );
  const layers = new Map<number, Record<string, Uint8Array>>();
  for (const item of plan) {
    for (const { name } of item.tensors) {
      const layer = Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1);
      if (layer >= 0 && !layers.has(layer)) {
        layers.clear(); // One block in memory at a time.
        const arrays = tuned ? tuned.layers[layer] : await readBlock(
          work,
          layer,
          await readLayer(checkpoint, layer),
          kept(layer),
          config,
          format,
        );
        layers.set(layer, layerBytes(arrays, layer, config, format));
      }
      const made = layer >= 0
        ? layers.get(layer)![name]
        : name === "model.norm.weight" && tuned
        ? f16Bytes(tuned.finalNorm)
        : undefined;
      await writer.write(name, made ?? await storedFloat16(checkpoint, name));
    }
  }
  await writeText(run.sink, "quantization.json", JSON.stringify(report, null, 2) + "\n");
  await copyFiles(checkpoint, run.sink);
  await writeText(run.sink, "config.json", quantizedConfig(checkpoint.configJson, format));
  await writer.finish();
  await work.clear();
  return report;
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

async function storedFloat16(
  checkpoint: Checkpoint,
  name: string,
): Promise<Uint8Array<ArrayBuffer>> {
  const { dtype, bytes } = checkpoint.info(name);
  return new Uint8Array(toFloat16(name, dtype, await checkpoint.read(name, 0, bytes)).buffer);
}

async function readFloats(
  checkpoint: Checkpoint,
  name: string,
): Promise<Float32Array<ArrayBuffer>> {
  const { dtype, bytes } = checkpoint.info(name);
  const data = await checkpoint.read(name, 0, bytes);
  assertFinite(name, dtype, data);
  return toFloat32(name, dtype, data);
}

async function readLayer(checkpoint: Checkpoint, layer: number) {
  const prefix = `model.layers.${layer}`;
  const matrices = {} as Record<LinearName, Float32Array<ArrayBuffer>>;
  for (const name of LINEAR_NAMES) {
    matrices[name] = await readFloats(checkpoint, `${prefix}.${name}.weight`);
  }
  const norms = {
    input: await readFloats(checkpoint, `${prefix}.input_layernorm.weight`),
    post: await readFloats(checkpoint, `${prefix}.post_attention_layernorm.weight`),
  };
  return { matrices, norms };
}

async function readEnds(checkpoint: Checkpoint): Promise<ModelEnds> {
  const embedding = await readFloats(checkpoint, "model.embed_tokens.weight");
  return {
    embedding,
    finalNorm: await readFloats(checkpoint, "model.norm.weight"),
    head: checkpoint.config.tiedEmbeddings
      ? embedding
      : await readFloats(checkpoint, "lm_head.weight"),
  };
}

/** A layer's tensors as they are stored, by name. */
function layerBytes(
  { matrices, norms }: LayerArrays,
  layer: number,
  config: ModelConfig,
  format: CodeGemmFormat,
): Record<string, Uint8Array> {
  const prefix = `model.layers.${layer}`;
  const out: Record<string, Uint8Array> = {
    [`${prefix}.input_layernorm.weight`]: f16Bytes(norms.input),
    [`${prefix}.post_attention_layernorm.weight`]: f16Bytes(norms.post),
  };
  for (const name of LINEAR_NAMES) {
    const arrays = matrices[name];
    // Float ones are copied from the checkpoint, unchanged.
    if (arrays instanceof Float32Array) continue;
    const stored = toStored(arrays, format, linearShape(config, name));
    for (const [kind, values] of Object.entries(stored)) {
      out[`${prefix}.${name}.${kind}`] = new Uint8Array(values.buffer);
    }
  }
  return out;
}

function f16Bytes(values: Float32Array): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Float16Array.from(values).buffer);
}

/** Keeps a finished block: a safetensors file of its tensors as they will be stored. */
async function writeBlock(
  work: WorkFiles,
  layer: number,
  arrays: LayerArrays,
  config: ModelConfig,
  format: CodeGemmFormat,
): Promise<void> {
  const tensors = Object.entries(layerBytes(arrays, layer, config, format)).map(([name, data]) => ({
    name,
    dtype: "U8" as const,
    shape: [data.length],
    bytes: data.length,
    data,
  }));
  await work.remove(blockFile(layer));
  await work.write(blockFile(layer), 0, encodeSafetensors(tensors));
}

async function readBlock(
  work: WorkFiles,
  layer: number,
  float: LayerArrays,
  kept: ReadonlySet<LinearName>,
  config: ModelConfig,
  format: CodeGemmFormat,
): Promise<LayerArrays> {
  const file = blockFile(layer), prefix = `model.layers.${layer}`;
  const places = new Map((await readHeader(work, file)).map((tensor) => [tensor.name, tensor]));
  const read = async (name: string) => {
    const place = places.get(`${prefix}.${name}`);
    invariant(place, `${file} holds ${name}`);
    return (await work.read(file, place.fileOffset, place.bytes)).buffer;
  };
  const matrices = {} as LayerArrays["matrices"];
  for (const name of LINEAR_NAMES) {
    if (kept.has(name)) {
      matrices[name] = float.matrices[name];
      continue;
    }
    const stored = {
      codes: new Uint32Array(await read(`${name}.codes`)),
      codebooks: new Uint16Array(await read(`${name}.codebooks`)),
      scales: new Uint16Array(await read(`${name}.scales`)),
    };
    matrices[name] = fromStored(stored, format, linearShape(config, name));
  }
  const norm = async (name: string) =>
    Float32Array.from(new Float16Array(await read(`${name}.weight`)));
  return {
    matrices,
    norms: {
      input: await norm("input_layernorm"),
      post: await norm("post_attention_layernorm"),
    },
  };
}
