/**
 * Reading what a quantization needs of a float checkpoint, layer by layer.
 *
 * @module
 */
import { assertFinite, type Checkpoint, toFloat16, toFloat32 } from "../shared/checkpoint/mod.ts";
import { LINEAR_NAMES, type LinearName } from "../shared/model_config.ts";
import type { ModelEnds } from "./gpu/model_tuner.ts";

/** A float tensor as float16, checked: what is not finite or beyond float16 is refused. */
export async function storedFloat16(
  checkpoint: Checkpoint,
  name: string,
): Promise<Uint8Array<ArrayBuffer>> {
  const { dtype, bytes } = checkpoint.info(name);
  return new Uint8Array(toFloat16(name, dtype, await checkpoint.read(name, 0, bytes)).buffer);
}

/** Hears how many bytes of how many have been looked through. */
export type OnCheck = (doneBytes: number, totalBytes: number) => void;

/**
 * Looks through all weights, so that a damaged one is found before hours of work.
 *
 * @throws FleetError `bad-checkpoint` that names the tensor and the element
 */
export async function checkWeights(
  checkpoint: Checkpoint,
  tensors: readonly { source: string }[],
  onCheck?: OnCheck,
): Promise<void> {
  const size = ({ source }: { source: string }) => checkpoint.info(source).bytes;
  const total = tensors.reduce((sum, tensor) => sum + size(tensor), 0);
  let done = 0;
  for (const tensor of tensors) {
    await storedFloat16(checkpoint, tensor.source);
    onCheck?.(done += size(tensor), total);
  }
}

/** A float tensor as float32, checked. */
async function readFloats(
  checkpoint: Checkpoint,
  name: string,
): Promise<Float32Array<ArrayBuffer>> {
  const { dtype, bytes } = checkpoint.info(name);
  const data = await checkpoint.read(name, 0, bytes);
  assertFinite(name, dtype, data);
  return toFloat32(name, dtype, data);
}

/** A float layer. */
export async function readLayer(checkpoint: Checkpoint, layer: number) {
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

/** What stands before and behind the layers. */
export async function readEnds(checkpoint: Checkpoint): Promise<ModelEnds> {
  const embedding = await readFloats(checkpoint, "model.embed_tokens.weight");
  return {
    embedding,
    finalNorm: await readFloats(checkpoint, "model.norm.weight"),
    head: checkpoint.config.tiedEmbeddings
      ? embedding
      : await readFloats(checkpoint, "lm_head.weight"),
  };
}
