/**
 * Checkpoints in Hugging Face's layout, float or CodeGEMM: opened, checked, and written.
 * `directory.ts` is a door of its own, because it is the only file here that needs Deno.
 *
 * @module
 */
export { parseModelConfig } from "./config.ts";
export {
  allParts,
  checkFormat,
  codegemmTensors,
  formatName,
  parseFormatName,
  partTensors,
  type WantedTensor,
  wantedTensors,
} from "./layout.ts";
export { type Checkpoint, checkTensors, openCheckpoint } from "./open.ts";
export {
  encodeHeader,
  encodeSafetensors,
  readHeader,
  type StoredTensor,
  type TensorBytes,
} from "./safetensors.ts";
export { type FileSource, memorySource } from "./source.ts";
export { parseTokenizerConfig, type TokenizerConfig } from "./tokenizer_config.ts";
export { assertFinite, toFloat16, toFloat32 } from "./values.ts";
