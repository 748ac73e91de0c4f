/**
 * A whole checkpoint: float in, CodeGEMM out, one part after another, one tensor in memory at a time.
 *
 * @module
 */
import {
  allParts,
  assertFinite,
  checkFormat,
  type Checkpoint,
  codegemmTensors,
  formatName,
  toFloat16,
  type WantedTensor,
  wantedTensors,
} from "../shared/checkpoint/mod.ts";
import type { Clock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import {
  type CodeGemmFormat,
  DTYPE_BYTES,
  LINEAR_NAMES,
  type TensorInfo,
} from "../shared/model_config.ts";
import { seededRandom } from "../shared/random.ts";
import {
  matrixBytes,
  type MatrixSettings,
  type QuantizedMatrix,
  quantizeMatrix,
  type StoredMatrix,
} from "./matrix.ts";
import { createShardWriter, type FileSink } from "./writer.ts";

/** How a checkpoint is quantized. */
export interface QuantizeSettings extends MatrixSettings {
  /** Same seed and settings, same bytes. */
  seed: number;
  /** Matrices whose names contain one of these, at dots, stay float16 (`mlp.down_proj`, `layers.0`). */
  keep: readonly string[];
  maxShardBytes: number;
}

/** What became of one matrix. */
export interface MatrixReport {
  name: string;
  shape: number[];
  /** `|W - Q| / |W|`. */
  relativeError: number;
  seconds: number;
}

/** What became of a checkpoint; `quantization.json` holds it. */
export interface QuantizeReport {
  format: string;
  settings: QuantizeSettings;
  seconds: number;
  matrices: MatrixReport[];
}

/** What a quantization takes beside its settings. */
export interface QuantizeRun {
  clock: Clock;
  /** Called after each matrix. */
  onMatrix?(report: MatrixReport, done: number, total: number): void;
}

/** Files that are taken over as they are. */
const COPIED = [
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "generation_config.json",
] as const;

const COPY_BYTES = 2 ** 24;

/**
 * Quantizes every linear layer of a checkpoint; embedding, output head and norms become float16.
 *
 * @throws FleetError `bad-checkpoint` when a matrix does not suit the format or holds a value that is
 *   not finite, `bad-usage` when there is nothing to quantize
 */
export async function quantizeCheckpoint(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  settings: QuantizeSettings,
  sink: FileSink,
  run: QuantizeRun,
): Promise<QuantizeReport> {
  if (checkpoint.config.codegemm) {
    throw new FleetError("bad-usage", "The checkpoint is in CodeGEMM format already");
  }
  const plan = planTensors(checkpoint, format, settings.keep);
  const total = plan.filter((item) => item.type === "quantize").length;
  if (total === 0) throw new FleetError("bad-usage", "--keep leaves no matrix to quantize");
  const writer = await createShardWriter(
    sink,
    plan.flatMap((item) => item.tensors),
    settings.maxShardBytes,
  );
  const startMs = run.clock.nowMs();
  const matrices: MatrixReport[] = [];
  for (const [index, item] of plan.entries()) {
    const { name, dtype, shape, bytes } = checkpoint.info(item.source);
    const data = await checkpoint.read(name, 0, bytes);
    if (item.type === "keep") {
      await writer.write(name, new Uint8Array(toFloat16(name, dtype, data).buffer));
      continue;
    }
    assertFinite(name, dtype, data);
    const matrixMs = run.clock.nowMs();
    const matrix: StoredMatrix = {
      name: item.matrix,
      dtype,
      shape: [shape[0], shape[1]],
      bytes: data,
    };
    // A seed of its own per matrix: leaving one out does not change the others.
    const random = seededRandom(settings.seed * 2 ** 20 + index);
    const quantized: QuantizedMatrix = quantizeMatrix(matrix, format, settings, random);
    for (const tensor of item.tensors) {
      await writer.write(tensor.name, matrixBytes(quantized, tensor.name));
    }
    matrices.push({
      name: item.matrix,
      shape,
      relativeError: quantized.relativeError,
      seconds: (run.clock.nowMs() - matrixMs) / 1000,
    });
    run.onMatrix?.(matrices.at(-1)!, matrices.length, total);
  }
  const report: QuantizeReport = {
    format: formatName(format),
    settings,
    seconds: (run.clock.nowMs() - startMs) / 1000,
    matrices,
  };
  await writeText(sink, "quantization.json", JSON.stringify(report, null, 2) + "\n");
  await copyFiles(checkpoint, sink);
  await writeText(sink, "config.json", quantizedConfig(checkpoint.configJson, format));
  await writer.finish();
  return report;
}

type PlannedTensors =
  | { type: "keep"; source: string; tensors: TensorInfo[] }
  | { type: "quantize"; source: string; matrix: string; tensors: TensorInfo[] };

/** What is read and what is written for it, in the order of the forward pass. */
function planTensors(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  keep: readonly string[],
): PlannedTensors[] {
  const { config } = checkpoint;
  const sources = new Map(
    allParts(config).flatMap((part) => wantedTensors(config, part)).map((t) => [t.name, t.shape]),
  );
  return [...sources].map(([source, shape]): PlannedTensors => {
    const matrix = source.replace(/\.weight$/, "");
    const linear = LINEAR_NAMES.some((name) => matrix.endsWith(`.${name}`));
    if (!linear || keep.some((part) => `.${matrix}.`.includes(`.${part}.`))) {
      return { type: "keep", source, tensors: [stored({ name: source, shape, dtypes: ["F16"] })] };
    }
    const [n, k] = shape;
    checkFormat(format, matrix, [n, k]);
    const tensors = codegemmTensors(format, matrix, [n, k]).map(stored);
    return { type: "quantize", source, matrix, tensors };
  });
}

function stored({ name, shape, dtypes: [dtype] }: WantedTensor): TensorInfo {
  const bytes = shape.reduce((product, size) => product * size, 1) * DTYPE_BYTES[dtype];
  return { name, dtype, shape, bytes };
}

/** The config of the result: the original's, with the section that marks the format. */
function quantizedConfig(configJson: string, { m, v, g, b }: CodeGemmFormat): string {
  const config = JSON.parse(configJson);
  // Transformers 4 calls it torch_dtype.
  for (const key of ["dtype", "torch_dtype"]) if (key in config) config[key] = "float16";
  config.codegemm = {
    group_size: g,
    vec_len: v,
    num_codebooks: m,
    nbits_per_codebook: b,
    arch_config: {
      layers_name: "layers",
      model_name: "model",
      module_names: LINEAR_NAMES,
    },
  };
  return JSON.stringify(config, null, 2) + "\n";
}

async function copyFiles(checkpoint: Checkpoint, sink: FileSink): Promise<void> {
  const names = new Set(await checkpoint.files.list());
  for (const name of COPIED.filter((name) => names.has(name))) {
    const size = await checkpoint.files.size(name);
    for (let offset = 0; offset < size; offset += COPY_BYTES) {
      const length = Math.min(COPY_BYTES, size - offset);
      await sink.write(name, offset, await checkpoint.files.read(name, offset, length));
    }
  }
}

function writeText(sink: FileSink, name: string, text: string): Promise<void> {
  return sink.write(name, 0, new TextEncoder().encode(text));
}
