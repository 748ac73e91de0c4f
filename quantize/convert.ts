/**
 * AQLM checkpoints (arXiv 2401.06118) to CodeGEMM ones: the same codes, centroids and scales in another
 * order, so the weights stay exactly what they were.
 *
 * | AQLM | here |
 * | --- | --- |
 * | `codes (N, K/v, m)`, int8 or (above 8 bits) int16 that stand for unsigned numbers | `codes`, as words of four or two |
 * | `codebooks (m, 2^b, 1, v)` float16 | `codebooks (m, 2^b, v)` |
 * | `scales (N, 1, 1, 1)` float16 | `scales (1, N)`: `group_size` -1, one per row |
 *
 * @module
 */
import { z } from "zod";
import {
  checkTensors,
  codegemmTensors,
  type FileSource,
  parseModelConfig,
  readHeader,
  type StoredTensor,
  toFloat16,
} from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import {
  type CodeGemmFormat,
  codesPerWord,
  type DType,
  DTYPE_BYTES,
  LINEAR_NAMES,
  ROW_SCALE,
  type TensorInfo,
} from "../shared/model_config.ts";
import { COPIED, quantizedConfig, writeText } from "./output.ts";
import { createShardWriter, type FileSink } from "./writer.ts";

const bad = (what: string) => new FleetError("bad-checkpoint", what);

const BITS = "only codes of 8 to 16 bits are supported";
const FLOATS = ["F16", "BF16", "F32"];
/** Of a float tensor, held at a time. */
const SLICE_ELEMENTS = 2 ** 24;

/** What `config.json` of an AQLM checkpoint says. */
const AqlmSection = z.object({
  quant_method: z.literal("aqlm"),
  in_group_size: z.number().int().min(1),
  out_group_size: z.literal(1, "only one output row per code is supported"),
  num_codebooks: z.number().int().min(1),
  nbits_per_codebook: z.number().int().min(8, BITS).max(16, BITS),
});

/**
 * The format that holds an AQLM checkpoint.
 *
 * @throws FleetError `bad-checkpoint` that says what it is, or has, instead
 */
export function aqlmFormat(configJson: string): CodeGemmFormat {
  const { quantization_config: section, codegemm } = parseJson(configJson);
  if (codegemm !== undefined) {
    throw bad("config.json: this is a CodeGEMM checkpoint; it runs as it is");
  }
  if (section === undefined) {
    throw bad(
      "config.json has no quantization_config: this is no AQLM checkpoint; deno task quantize turns " +
        "a float one into one to run",
    );
  }
  const parsed = AqlmSection.safeParse(section);
  if (!parsed.success) {
    const { path, message } = parsed.error.issues[0];
    throw bad(`config.json: ${["quantization_config", ...path].join(".")}: ${message}`);
  }
  const { in_group_size: v, num_codebooks: m, nbits_per_codebook: b } = parsed.data;
  return { m, v, g: ROW_SCALE, b };
}

function parseJson(configJson: string): Record<string, unknown> {
  try {
    return JSON.parse(configJson);
  } catch (cause) {
    throw new FleetError("bad-checkpoint", "config.json is not JSON", { cause });
  }
}

/** What is written of a source: a matrix of codes, or a float tensor. */
type Planned =
  | { type: "matrix"; source: AqlmMatrix; tensors: TensorInfo[] }
  | { type: "float"; source: StoredTensor; tensors: TensorInfo[] };

/** The tensors of one AQLM matrix. */
interface AqlmMatrix {
  name: string;
  /** `[N, K / v]` */
  positions: readonly [n: number, perRow: number];
  codes: StoredTensor;
  codebooks: StoredTensor;
  scales: StoredTensor;
}

/** What a conversion tells. */
export interface ConvertRun {
  onPlanned?(bytes: number): Promise<void>;
  onMatrix?(name: string, done: number, total: number): void;
}

/**
 * Converts a checkpoint. Everything is checked but the values before anything is written.
 *
 * @param run what is told: before anything is written, how many bytes of tensors there will be (a
 *   rejection ends it there); after each matrix, how many there are
 * @throws FleetError `bad-checkpoint` that names what cannot be read
 */
export async function convertAqlm(
  files: FileSource,
  sink: FileSink,
  maxShardBytes: number,
  run: ConvertRun = {},
): Promise<CodeGemmFormat> {
  const names = await files.list();
  if (!names.includes("config.json")) {
    throw bad("There is no config.json; is this a model directory?");
  }
  const whole = async (name: string) => await files.read(name, 0, await files.size(name));
  const aqlmJson = new TextDecoder().decode(await whole("config.json"));
  const format = aqlmFormat(aqlmJson);
  const configJson = convertedConfig(aqlmJson, format);
  const planned = planConversion(configJson, await storedTensors(files, names), format);
  const tensors = planned.flatMap((item) => item.tensors);
  await run.onPlanned?.(tensors.reduce((sum, { bytes }) => sum + bytes, 0));
  const writer = await createShardWriter(sink, tensors, maxShardBytes);
  const total = planned.filter((item) => item.type === "matrix").length;
  let done = 0;
  for (const { type, source, tensors } of planned) {
    if (type === "float") {
      await writer.write(source.name, readHalves(files, source));
      continue;
    }
    const [codes, codebooks, scales] = tensors;
    const bytes = await files.read(source.codes.file, source.codes.fileOffset, source.codes.bytes);
    const words = packCodes(unsignedCodes(source.codes, bytes, format), format, source.positions);
    await writer.write(codes.name, new Uint8Array(words.buffer));
    // Of one output row per code, and of one scale per row: the same elements in the same order.
    await writer.write(codebooks.name, readHalves(files, source.codebooks));
    await writer.write(scales.name, readHalves(files, source.scales));
    run.onMatrix?.(source.name, ++done, total);
  }
  for (const name of COPIED.filter((name) => names.includes(name))) {
    await sink.write(name, 0, await whole(name));
  }
  await writeText(sink, "config.json", configJson);
  await writer.finish();
  return format;
}

function convertedConfig(aqlmJson: string, format: CodeGemmFormat): string {
  const { quantization_config: _, ...config } = JSON.parse(quantizedConfig(aqlmJson, format));
  return JSON.stringify(config, null, 2) + "\n";
}

async function storedTensors(
  files: FileSource,
  names: readonly string[],
): Promise<Map<string, StoredTensor>> {
  const tensors = new Map<string, StoredTensor>();
  for (const file of names.filter((name) => name.endsWith(".safetensors"))) {
    for (const tensor of await readHeader(files, file)) tensors.set(tensor.name, tensor);
  }
  return tensors;
}

/** What is written, checked against the config of the result. */
function planConversion(
  configJson: string,
  stored: ReadonlyMap<string, StoredTensor>,
  format: CodeGemmFormat,
): Planned[] {
  const matrices = [...stored.keys()]
    .filter((name) => LINEAR_NAMES.some((linear) => name.endsWith(`.${linear}.codes`)))
    .map((name) => name.slice(0, -".codes".length));
  if (matrices.length === 0) throw bad("No matrix has codes: this is no AQLM checkpoint");
  const planned = matrices.map((name): Planned => {
    const source = aqlmMatrix(name, stored, format);
    const [n, perRow] = source.positions;
    const tensors = codegemmTensors(format, name, [n, perRow * format.v])
      .map(({ name, shape, dtypes: [dtype] }) => sized(name, dtype, shape));
    return { type: "matrix", source, tensors };
  });
  const taken = new Set(
    planned.flatMap(({ type, source }) =>
      type === "matrix" ? [source.codes, source.codebooks, source.scales] : []
    ),
  );
  for (const source of stored.values()) {
    if (taken.has(source) || !FLOATS.includes(source.dtype)) continue;
    planned.push({ type: "float", source, tensors: [sized(source.name, "F16", source.shape)] });
  }
  const result = planned.flatMap(({ type, source, tensors }) =>
    tensors.map((tensor) => ({
      ...tensor,
      file: type === "float" ? source.file : source.codes.file,
    }))
  );
  checkTensors(
    parseModelConfig(configJson),
    new Map(result.map((tensor) => [tensor.name, tensor])),
  );
  return planned;
}

/** Finds a matrix's tensors, and checks their types and that their shapes agree. */
function aqlmMatrix(
  name: string,
  stored: ReadonlyMap<string, StoredTensor>,
  { m, v, b }: CodeGemmFormat,
): AqlmMatrix {
  const find = (kind: string, dtypes: string[], shapeOf: (found: number[]) => number[]) => {
    const tensor = stored.get(`${name}.${kind}`);
    if (!tensor) throw bad(`${name}.${kind} is missing`);
    const shape = shapeOf(tensor.shape);
    if (!dtypes.includes(tensor.dtype) || tensor.shape.join() !== shape.join()) {
      throw bad(
        `${tensor.file}: ${tensor.name} is ${tensor.dtype} [${tensor.shape}]; expected ` +
          `${dtypes.join(" or ")} [${shape}]`,
      );
    }
    return tensor;
  };
  const codes = find("codes", b > 8 ? ["I16", "U16"] : ["I8", "U8"], ([n, i]) => [n, i, m]);
  const [n, perRow] = codes.shape;
  return {
    name,
    positions: [n, perRow],
    codes,
    codebooks: find("codebooks", FLOATS, () => [m, 2 ** b, 1, v]),
    scales: find("scales", FLOATS, () => [n, 1, 1, 1]),
  };
}

/**
 * A stored tensor of codes as unsigned numbers. AQLM writes a code of `2^(b-1)` or more less `2^b`, so
 * that it fits a signed integer; its lowest b bits are the code.
 */
function unsignedCodes(
  { name, file }: StoredTensor,
  bytes: Uint8Array<ArrayBuffer>,
  { b }: CodeGemmFormat,
): Uint8Array | Uint16Array {
  if (b === 8) return bytes;
  const codes = new Uint16Array(bytes.slice().buffer);
  if (b === 16) return codes;
  const low = 2 ** b - 1, least = 2 ** 16 - 2 ** (b - 1);
  for (let i = 0; i < codes.length; i++) {
    const stored = codes[i];
    if (stored > low && stored < least) {
      throw bad(`${file}: ${name}: element ${i} is no code of ${b} bits`);
    }
    codes[i] = stored & low;
  }
  return codes;
}

/** Rows packed at a time: a cache line of words. */
const PACKED_ROWS = 16;

/**
 * Codes as they lie in AQLM, `(N, K/v, m)`, to words `(m, K/v/4, N)`, or `(m, K/v/2, N)` where codes
 * have more than 8 bits.
 */
export function packCodes(
  codes: Uint8Array | Uint16Array,
  format: CodeGemmFormat,
  [n, positions]: readonly [n: number, positions: number],
): Uint32Array<ArrayBuffer> {
  const { m } = format;
  const perWord = codesPerWord(format), width = 32 / perWord;
  const lines = positions / perWord;
  const words = new Uint32Array(m * lines * n);
  for (let first = 0; first < n; first += PACKED_ROWS) {
    const last = Math.min(n, first + PACKED_ROWS);
    for (let line = 0; line < m * lines; line++) {
      const book = Math.floor(line / lines);
      for (let row = first; row < last; row++) {
        const from = (row * positions + (line - book * lines) * perWord) * m + book;
        let word = 0;
        for (let at = 0; at < perWord; at++) word |= codes[from + at * m] << (at * width);
        words[line * n + row] = word;
      }
    }
  }
  return words;
}

/** A float tensor as float16, a slice at a time. */
async function* readHalves(
  files: FileSource,
  { name, dtype, file, fileOffset, bytes }: StoredTensor,
): AsyncGenerator<Uint8Array> {
  const element = DTYPE_BYTES[dtype as DType];
  const sliceBytes = SLICE_ELEMENTS * element;
  for (let at = 0; at < bytes; at += sliceBytes) {
    const slice = await files.read(file, fileOffset + at, Math.min(sliceBytes, bytes - at));
    const halves = toFloat16(name, dtype as DType, slice, at / element);
    yield new Uint8Array(halves.buffer, halves.byteOffset, halves.byteLength);
  }
}

function sized(name: string, dtype: DType, shape: number[]): TensorInfo {
  return { name, dtype, shape, bytes: shape.reduce((a, b) => a * b, 1) * DTYPE_BYTES[dtype] };
}
