/**
 * What a quantized checkpoint consists of beside the arithmetic: which tensors it holds, its config,
 * the files that are taken over.
 *
 * @module
 */
import {
  allParts,
  checkFormat,
  type Checkpoint,
  codegemmTensors,
  type WantedTensor,
  wantedTensors,
} from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import {
  type CodeGemmFormat,
  DTYPE_BYTES,
  LINEAR_NAMES,
  type TensorInfo,
} from "../shared/model_config.ts";
import type { FileSink } from "./writer.ts";

/** Files that are taken over as they are. */
export const COPIED = [
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "generation_config.json",
] as const;

const COPY_BYTES = 2 ** 24;

/** What is read and what is written for it. */
export type PlannedTensors =
  | { type: "keep"; source: string; tensors: TensorInfo[] }
  | { type: "quantize"; source: string; matrix: string; tensors: TensorInfo[] };

/**
 * Which matrices are quantized, in the order of the forward pass.
 *
 * @param keep matrices whose names contain one of these, at dots, stay float16
 * @param fallback what becomes of a matrix whose shape does not suit the format
 * @throws FleetError `bad-checkpoint` that names such a matrix, where there is no fallback; `bad-usage`
 *   when the checkpoint is quantized already, a name in `keep` is no matrix's, or none is left
 */
export function planTensors(
  checkpoint: Checkpoint,
  format: CodeGemmFormat,
  keep: readonly string[],
  fallback?: "float16",
): PlannedTensors[] {
  const { config } = checkpoint;
  if (config.codegemm) {
    throw new FleetError("bad-usage", "The checkpoint is in CodeGEMM format already");
  }
  const sources = new Map(
    allParts(config).flatMap((part) => wantedTensors(config, part)).map((t) => [t.name, t.shape]),
  );
  const contains = (source: string, part: string) => `.${source}.`.includes(`.${part}.`);
  const unknown = keep.find((part) => ![...sources.keys()].some((name) => contains(name, part)));
  if (unknown !== undefined) {
    throw new FleetError(
      "bad-usage",
      `--keep ${unknown}: no matrix has that in its name, such as model.layers.0.mlp.down_proj, ` +
        "between dots",
    );
  }
  const plan = [...sources].map(([source, shape]): PlannedTensors => {
    const matrix = source.replace(/\.weight$/, "");
    const linear = LINEAR_NAMES.some((name) => matrix.endsWith(`.${name}`));
    if (
      !linear || keep.some((part) => contains(source, part)) ||
      fallback === "float16" && !suits(format, matrix, shape)
    ) {
      return { type: "keep", source, tensors: [stored({ name: source, shape, dtypes: ["F16"] })] };
    }
    const [n, k] = shape;
    checkFormat(format, matrix, [n, k]);
    const tensors = codegemmTensors(format, matrix, [n, k]).map(stored);
    return { type: "quantize", source, matrix, tensors };
  });
  if (!plan.some(({ type }) => type === "quantize")) {
    throw new FleetError("bad-usage", "--keep and --fallback leave no matrix to quantize");
  }
  return plan;
}

function suits(format: CodeGemmFormat, matrix: string, [n, k]: number[]): boolean {
  try {
    checkFormat(format, matrix, [n, k]);
    return true;
  } catch (error) {
    if (error instanceof FleetError) return false;
    throw error;
  }
}

function stored({ name, shape, dtypes: [dtype] }: WantedTensor): TensorInfo {
  const bytes = shape.reduce((product, size) => product * size, 1) * DTYPE_BYTES[dtype];
  return { name, dtype, shape, bytes };
}

/** The config of the result: the original's, with the section that marks the format. */
export function quantizedConfig(configJson: string, { m, v, g, b }: CodeGemmFormat): string {
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

/** Copies the files beside the weights that a reader of the result needs. */
export async function copyFiles(checkpoint: Checkpoint, sink: FileSink): Promise<void> {
  const names = new Set(await checkpoint.files.list());
  for (const name of COPIED.filter((name) => names.has(name))) {
    const size = await checkpoint.files.size(name);
    for (let offset = 0; offset < size; offset += COPY_BYTES) {
      const length = Math.min(COPY_BYTES, size - offset);
      await sink.write(name, offset, await checkpoint.files.read(name, offset, length));
    }
  }
}

/** Writes a text file. */
export function writeText(sink: FileSink, name: string, text: string): Promise<void> {
  return sink.write(name, 0, new TextEncoder().encode(text));
}
