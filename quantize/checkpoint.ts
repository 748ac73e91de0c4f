/**
 * A whole checkpoint: float in, CodeGEMM out, one part after another, one tensor in memory at a time.
 *
 * @module
 */
import { type Checkpoint, formatName } from "../shared/checkpoint/mod.ts";
import type { Clock } from "../shared/clock.ts";
import type { CodeGemmFormat } from "../shared/model_config.ts";
import { seededRandom } from "../shared/random.ts";
import { checkWeights, type OnCheck, storedFloat16 } from "./float_layers.ts";
import {
  matrixBytes,
  type MatrixSettings,
  type QuantizedMatrix,
  quantizeMatrix,
  type StoredMatrix,
} from "./matrix.ts";
import { copyFiles, planTensors, quantizedConfig, writeText } from "./output.ts";
import { createShardWriter, type FileSink } from "./writer.ts";

/** How a checkpoint is quantized. */
export interface QuantizeSettings extends MatrixSettings {
  /** Same seed and settings, same bytes. */
  seed: number;
  /** Matrices whose names contain one of these, at dots, stay float16 (`mlp.down_proj`, `layers.0`). */
  keep: readonly string[];
  /** What becomes of a matrix whose shape does not suit the format; by default an error. */
  fallback?: "float16";
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
  onCheck?: OnCheck;
  /** Called after each matrix. */
  onMatrix?(report: MatrixReport, done: number, total: number): void;
}

/**
 * Quantizes every linear layer of a checkpoint; embedding, output head and norms become float16. All
 * weights are looked through before anything is written.
 *
 * @throws FleetError `bad-checkpoint` when a matrix does not suit the format or holds a value that is
 *   not finite, `bad-usage` as `planTensors()`
 */
export async function quantizeCheckpoint(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  settings: QuantizeSettings,
  sink: FileSink,
  run: QuantizeRun,
): Promise<QuantizeReport> {
  const plan = planTensors(checkpoint, format, settings.keep, settings.fallback);
  const total = plan.filter((item) => item.type === "quantize").length;
  const startMs = run.clock.nowMs();
  await checkWeights(checkpoint, plan, run.onCheck);
  const writer = await createShardWriter(
    sink,
    plan.flatMap((item) => item.tensors),
    settings.maxShardBytes,
  );
  const matrices: MatrixReport[] = [];
  for (const [index, item] of plan.entries()) {
    const { name, dtype, shape, bytes } = checkpoint.info(item.source);
    if (item.type === "keep") {
      await writer.write(name, await storedFloat16(checkpoint, name));
      continue;
    }
    const matrixMs = run.clock.nowMs();
    const matrix: StoredMatrix = {
      name: item.matrix,
      dtype,
      shape: [shape[0], shape[1]],
      bytes: await checkpoint.read(name, 0, bytes),
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
