/**
 * AQLM checkpoints (arXiv 2401.06118) to CodeGEMM ones: the same codes and centroids in another
 * order, so the weights stay exactly what they were.
 *
 * An AQLM matrix has `codes (N, K / v, m)`, stored as signed integers that stand for unsigned ones,
 * `codebooks (m, 256, 1, v)` and one scale per output row, `scales (N, 1, 1, 1)`. CodeGEMM keeps a scale
 * per g weights of a row: here the row's, repeated.
 *
 * @module
 */
import { z } from "zod";
import {
  checkFormat,
  codegemmTensors,
  type FileSource,
  readHeader,
  type StoredTensor,
  toFloat16,
} from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import {
  type CodeGemmFormat,
  DTYPE_BYTES,
  LINEAR_NAMES,
  type TensorInfo,
} from "../shared/model_config.ts";
import { toStored } from "./layout.ts";
import { COPIED, quantizedConfig, writeText } from "./output.ts";
import { createShardWriter, type FileSink } from "./writer.ts";

const bad = (what: string) => new FleetError("bad-checkpoint", what);

/** What `config.json` of an AQLM checkpoint says. */
const AqlmSection = z.object({
  quant_method: z.literal("aqlm"),
  in_group_size: z.number().int().min(1),
  out_group_size: z.literal(1, "only one output row per code is supported"),
  num_codebooks: z.number().int().min(1),
  nbits_per_codebook: z.literal(8, "only codes of 8 bits are supported"),
});

/** Weights that share a scale: the row's scale is repeated, so any g that divides K is right. */
const GROUPS = [128, 64, 32, 16, 8];

/** The format that holds an AQLM checkpoint. */
export function aqlmFormat(
  configJson: string,
  kOf: readonly number[],
): CodeGemmFormat {
  const parsed = AqlmSection.safeParse(JSON.parse(configJson).quantization_config);
  if (!parsed.success) {
    const { path, message } = parsed.error.issues[0];
    throw bad(`config.json: quantization_config.${path.join(".")}: ${message}`);
  }
  const { in_group_size: v, num_codebooks: m } = parsed.data;
  const g = GROUPS.find((g) => g % v === 0 && kOf.every((k) => k % g === 0));
  if (g === undefined) throw bad(`No group size suits vectors of ${v} and all matrices`);
  return { m, v, g, b: 8 };
}

/**
 * Converts a checkpoint.
 *
 * @throws FleetError `bad-checkpoint` that names what cannot be read
 */
export async function convertAqlm(
  files: FileSource,
  sink: FileSink,
  maxShardBytes: number,
  onMatrix?: (name: string) => void,
): Promise<CodeGemmFormat> {
  const names = await files.list();
  const text = async (name: string) => {
    if (!names.includes(name)) throw bad(`There is no ${name}; is this a model directory?`);
    return new TextDecoder().decode(await files.read(name, 0, await files.size(name)));
  };
  const configJson = await text("config.json");
  const tensors = new Map<string, StoredTensor>();
  for (const file of names.filter((name) => name.endsWith(".safetensors"))) {
    for (const tensor of await readHeader(files, file)) tensors.set(tensor.name, tensor);
  }
  const matrices = [...tensors.keys()].filter((name) =>
    LINEAR_NAMES.some((linear) => name.endsWith(`.${linear}.codes`))
  ).map((name) => name.slice(0, -".codes".length));
  if (matrices.length === 0) throw bad("No matrix has codes: this is no AQLM checkpoint");
  const shapeOf = (matrix: string): [n: number, k: number] => {
    const codes = tensors.get(`${matrix}.codes`)!, books = tensors.get(`${matrix}.codebooks`);
    if (!books) throw bad(`${matrix}.codebooks is missing`);
    return [codes.shape[0], codes.shape[1] * books.shape.at(-1)!];
  };
  const format = aqlmFormat(configJson, matrices.map((matrix) => shapeOf(matrix)[1]));
  const planned: { tensors: TensorInfo[]; matrix?: string; source?: StoredTensor }[] = [];
  for (const matrix of matrices) {
    const shape = shapeOf(matrix);
    checkFormat(format, matrix, shape);
    checkAqlm(matrix, tensors, format, shape);
    planned.push({
      matrix,
      tensors: codegemmTensors(format, matrix, shape).map(({ name, shape, dtypes: [dtype] }) =>
        sized(name, dtype, shape)
      ),
    });
  }
  for (const source of tensors.values()) {
    if (matrices.some((matrix) => source.name.startsWith(`${matrix}.`))) continue;
    if (source.dtype !== "F16" && source.dtype !== "BF16" && source.dtype !== "F32") continue;
    planned.push({ source, tensors: [sized(source.name, "F16", source.shape)] });
  }
  const writer = await createShardWriter(
    sink,
    planned.flatMap((item) => item.tensors),
    maxShardBytes,
  );
  const read = ({ file, fileOffset, bytes }: StoredTensor) => files.read(file, fileOffset, bytes);
  for (const { matrix, source } of planned) {
    if (source) {
      const halves = toFloat16(source.name, source.dtype as "F16", await read(source));
      await writer.write(source.name, new Uint8Array(halves.buffer));
      continue;
    }
    const [n, k] = shapeOf(matrix!), { g } = format;
    const codes = await read(tensors.get(`${matrix}.codes`)!);
    const floats = async (kind: string) => {
      const tensor = tensors.get(`${matrix}.${kind}`)!;
      const halves = toFloat16(tensor.name, tensor.dtype as "F16", await read(tensor));
      return Float32Array.from(new Float16Array(halves.buffer));
    };
    const rowScales = await floats("scales");
    const stored = toStored(
      {
        // A signed byte's bits are the unsigned code.
        codes: Uint32Array.from(codes),
        codebooks: await floats("codebooks"),
        scales: Float32Array.from(
          { length: n * k / g },
          (_, i) => rowScales[Math.floor(i / (k / g))],
        ),
      },
      format,
      [n, k],
    );
    for (const [kind, values] of Object.entries(stored)) {
      await writer.write(`${matrix}.${kind}`, new Uint8Array(values.buffer));
    }
    onMatrix?.(matrix!);
  }
  for (const name of COPIED.filter((name) => names.includes(name))) {
    await sink.write(name, 0, await files.read(name, 0, await files.size(name)));
  }
  const config = JSON.parse(quantizedConfig(configJson, format));
  delete config.quantization_config;
  await writeText(sink, "config.json", JSON.stringify(config, null, 2) + "\n");
  await writer.finish();
  return format;
}

function checkAqlm(
  matrix: string,
  tensors: ReadonlyMap<string, StoredTensor>,
  { m, v }: CodeGemmFormat,
  [n, k]: readonly [n: number, k: number],
): void {
  const expect = (kind: string, dtypes: string[], shape: number[]) => {
    const tensor = tensors.get(`${matrix}.${kind}`);
    if (!tensor) throw bad(`${matrix}.${kind} is missing`);
    if (!dtypes.includes(tensor.dtype) || tensor.shape.join() !== shape.join()) {
      throw bad(
        `${tensor.file}: ${tensor.name} is ${tensor.dtype} [${tensor.shape}]; expected ` +
          `${dtypes.join(" or ")} [${shape}]`,
      );
    }
  };
  expect("codes", ["I8", "U8"], [n, k / v, m]);
  expect("codebooks", ["F16", "BF16", "F32"], [m, 256, 1, v]);
  expect("scales", ["F16", "BF16", "F32"], [n, 1, 1, 1]);
}

function sized(name: string, dtype: TensorInfo["dtype"], shape: number[]): TensorInfo {
  return { name, dtype, shape, bytes: shape.reduce((a, b) => a * b, 1) * DTYPE_BYTES[dtype] };
}
