/**
 * Opens a checkpoint: finds its shards, reads their headers, and checks every tensor against the
 * config before anybody starts to load it.
 *
 * @module
 */
import { FleetError, invariant } from "../errors.ts";
import { LIMITS } from "../limits.ts";
import type { ModelConfig, TensorInfo, TensorSource } from "../model_config.ts";
import { parseModelConfig } from "./config.ts";
import { allParts, wantedTensors } from "./layout.ts";
import { isDType, readHeader, type StoredTensor } from "./safetensors.ts";
import { type FileSource, parseJsonObject, readText } from "./source.ts";
import { parseTokenizerConfig } from "./tokenizer_config.ts";

const INDEX = "model.safetensors.index.json";
const SINGLE = "model.safetensors";

/** An open checkpoint: its tensors, its config, and the texts that lie beside them. */
export interface Checkpoint extends TensorSource {
  /** With the end-of-sequence ids of `generation_config.json` merged in. */
  config: ModelConfig;
  /** `config.json` as it is. */
  configJson: string;
  tokenizerJson?: string;
  tokenizerConfigJson?: string;
  /** Jinja source: `chat_template.jinja`, else the one in `tokenizer_config.json`. */
  chatTemplate?: string;
  files: FileSource;
}

/**
 * Opens and checks a checkpoint in Hugging Face's layout.
 *
 * @throws FleetError `bad-checkpoint` or `not-found` that names the file and, where one is to
 *   blame, the tensor
 */
export async function openCheckpoint(files: FileSource): Promise<Checkpoint> {
  const names = new Set(await files.list());
  const text = (name: string, maxBytes: number) => readText(files, names, name, maxBytes);
  const configJson = await text("config.json", LIMITS.maxConfigBytes);
  if (configJson === undefined) {
    throw new FleetError("bad-checkpoint", "There is no config.json; is this a model directory?");
  }
  const config = parseModelConfig(
    configJson,
    await text("generation_config.json", LIMITS.maxConfigBytes),
  );
  const tensors = await storedTensors(files, names);
  checkTensors(config, tensors);

  const tokenizerJson = await text("tokenizer.json", LIMITS.maxTokenizerBytes);
  const tokenizerConfigJson = await text("tokenizer_config.json", LIMITS.maxTokenizerBytes);
  const chatTemplate = await text("chat_template.jinja", LIMITS.maxTokenizerBytes) ??
    parseTokenizerConfig(tokenizerConfigJson).chatTemplate;
  return {
    config,
    configJson,
    ...(tokenizerJson === undefined ? {} : { tokenizerJson }),
    ...(tokenizerConfigJson === undefined ? {} : { tokenizerConfigJson }),
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
    files,
    ...tensorSource(files, tensors),
  };
}

/** The tensors of all shards, by name. */
async function storedTensors(
  files: FileSource,
  names: ReadonlySet<string>,
): Promise<Map<string, StoredTensor>> {
  const indexJson = await readText(files, names, INDEX, LIMITS.maxTokenizerBytes);
  if (indexJson === undefined) {
    if (!names.has(SINGLE)) {
      throw new FleetError("bad-checkpoint", `There is neither ${INDEX} nor ${SINGLE}`);
    }
    return new Map((await readHeader(files, SINGLE)).map((tensor) => [tensor.name, tensor]));
  }
  const fileOf = parseIndex(indexJson);
  for (const [name, file] of fileOf) {
    if (!names.has(file)) {
      throw new FleetError(
        "bad-checkpoint",
        `${file} is missing; ${INDEX} says that it holds ${name}`,
      );
    }
  }
  const tensors = new Map<string, StoredTensor>();
  for (const file of new Set(fileOf.values())) {
    for (const tensor of await readHeader(files, file)) {
      if (fileOf.get(tensor.name) === file) tensors.set(tensor.name, tensor);
    }
  }
  for (const [name, file] of fileOf) {
    if (!tensors.has(name)) {
      throw new FleetError(
        "bad-checkpoint",
        `${file} does not hold ${name}, though ${INDEX} says so`,
      );
    }
  }
  return tensors;
}

function parseIndex(json: string): Map<string, string> {
  const map = parseJsonObject(INDEX, json).weight_map;
  if (typeof map !== "object" || map === null || Array.isArray(map)) {
    throw new FleetError("bad-checkpoint", `${INDEX} has no weight_map`);
  }
  const fileOf = new Map<string, string>();
  for (const [name, file] of Object.entries(map)) {
    // A plain name only: a downloaded index must not reach outside its directory.
    if (typeof file !== "string" || !/^[^/\\]+\.safetensors$/.test(file)) {
      throw new FleetError(
        "bad-checkpoint",
        `${INDEX}: ${name} is said to be in ${
          JSON.stringify(file)
        }, which is no safetensors file here`,
      );
    }
    fileOf.set(name, file);
  }
  return fileOf;
}

/**
 * Checks that tensors are what a config asks for: all there, of the right shapes and types, and none
 * that the forward pass would have to use but does not know of.
 *
 * @throws FleetError `bad-checkpoint` that names the file and the tensor
 */
export function checkTensors(
  config: ModelConfig,
  tensors: ReadonlyMap<string, Omit<StoredTensor, "fileOffset">>,
): void {
  const has = (name: string) => tensors.has(name);
  const wanted = allParts(config).flatMap((part) => wantedTensors(config, part, has));
  checkLeftovers(config, new Set(wanted.map((tensor) => tensor.name)), tensors);
  const bad = (what: string) => new FleetError("bad-checkpoint", what);
  for (const { name, shape, dtypes } of wanted) {
    const stored = tensors.get(name);
    if (!stored) {
      throw bad(`${name} (${shape.join(" x ")}) is missing; config.json asks for it`);
    }
    if (!dtypes.some((dtype) => dtype === stored.dtype)) {
      throw bad(`${stored.file}: ${name} is ${stored.dtype}; expected ${dtypes.join(" or ")}`);
    }
    if (shape.length !== stored.shape.length || shape.some((n, i) => n !== stored.shape[i])) {
      throw bad(
        `${stored.file}: ${name} is ${stored.shape.join(" x ")}; config.json asks for ${
          shape.join(" x ")
        }`,
      );
    }
  }
}

/** Tensors that the forward pass would have to use but does not know of. */
function checkLeftovers(
  config: ModelConfig,
  wanted: ReadonlySet<string>,
  tensors: ReadonlyMap<string, Pick<StoredTensor, "name" | "file">>,
): void {
  for (const { name, file } of tensors.values()) {
    if (wanted.has(name)) continue;
    const layer = /^model\.layers\.(\d+)\./.exec(name)?.[1];
    const why = layer !== undefined && Number(layer) >= config.layers
      ? `config.json has ${config.layers} layers only`
      : name.endsWith(".bias")
      ? "biases are not supported"
      : /\.(codes|codebooks|scales)$/.test(name)
      ? config.codegemm
        ? "the matrix is there as .weight too"
        : "config.json has no codegemm section"
      : undefined;
    if (why) throw new FleetError("bad-checkpoint", `${file}: ${name} is there, but ${why}`);
  }
}

/** The tensors of element types that we read; others (a stored boolean mask, say) stay unseen. */
function tensorSource(
  files: FileSource,
  tensors: ReadonlyMap<string, StoredTensor>,
): TensorSource {
  const readable = new Map<string, TensorInfo & StoredTensor>();
  for (const tensor of tensors.values()) {
    const { name, dtype } = tensor;
    if (isDType(dtype)) readable.set(name, { ...tensor, dtype });
  }
  const get = (name: string) => {
    const tensor = readable.get(name);
    if (!tensor) throw new FleetError("bad-checkpoint", `The checkpoint has no tensor ${name}`);
    return tensor;
  };
  return {
    names: () => [...readable.keys()],
    has: (name) => readable.has(name),
    info(name) {
      const { dtype, shape, bytes } = get(name);
      return { name, dtype, shape, bytes };
    },
    // deno-lint-ignore require-await -- async, so that a missing tensor rejects instead of throwing
    async read(name, offset, length) {
      const { file, fileOffset, bytes } = get(name);
      invariant(offset >= 0 && length >= 0 && offset + length <= bytes, `a slice inside ${name}`);
      return files.read(file, fileOffset + offset, length);
    },
  };
}
