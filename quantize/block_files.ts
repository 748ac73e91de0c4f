/**
 * Finished blocks as files: what they hold is what the checkpoint will.
 *
 * @module
 */
import { encodeSafetensors, readHeader } from "../shared/checkpoint/mod.ts";
import { invariant } from "../shared/errors.ts";
import {
  type CodeGemmFormat,
  LINEAR_NAMES,
  type LinearName,
  linearShape,
  type ModelConfig,
} from "../shared/model_config.ts";
import type { LayerArrays } from "./gpu/tuned_layer.ts";
import { fromStored, toStored } from "./layout.ts";
import type { WorkFiles } from "./work_files.ts";

const blockFile = (layer: number) => `block-${layer}.safetensors`;

/** A layer's tensors as they are stored, by name. */
export function layerBytes(
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

/** Floats as float16 bytes. */
export function f16Bytes(values: Float32Array): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Float16Array.from(values).buffer);
}

/** Puts a finished block on disk: a safetensors file of its tensors as they will be stored. */
export async function writeBlock(
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
  await work.sync(blockFile(layer));
}

/** Reads the tensors of a finished block as they are stored, by name. */
export async function readBlockBytes(
  work: WorkFiles,
  layer: number,
): Promise<Record<string, Uint8Array<ArrayBuffer>>> {
  const file = blockFile(layer), out: Record<string, Uint8Array<ArrayBuffer>> = {};
  for (const { name, fileOffset, bytes } of await readHeader(work, file)) {
    out[name] = await work.read(file, fileOffset, bytes);
  }
  return out;
}

/** Reads a finished block; matrices that are kept come from the `float` layer. */
export async function readBlock(
  work: WorkFiles,
  layer: number,
  float: LayerArrays,
  kept: ReadonlySet<LinearName>,
  config: ModelConfig,
  format: CodeGemmFormat,
): Promise<LayerArrays> {
  const tensors = await readBlockBytes(work, layer);
  const read = (name: string) => {
    const bytes = tensors[`model.layers.${layer}.${name}`];
    invariant(bytes, `${blockFile(layer)} holds ${name}`);
    return bytes.buffer;
  };
  const matrices = {} as LayerArrays["matrices"];
  for (const name of LINEAR_NAMES) {
    if (kept.has(name)) {
      matrices[name] = float.matrices[name];
      continue;
    }
    const stored = {
      codes: new Uint32Array(read(`${name}.codes`)),
      codebooks: new Uint16Array(read(`${name}.codebooks`)),
      scales: new Uint16Array(read(`${name}.scales`)),
    };
    matrices[name] = fromStored(stored, format, linearShape(config, name));
  }
  const norm = (name: string) => Float32Array.from(new Float16Array(read(`${name}.weight`)));
  return {
    matrices,
    norms: {
      input: norm("input_layernorm"),
      post: norm("post_attention_layernorm"),
    },
  };
}
