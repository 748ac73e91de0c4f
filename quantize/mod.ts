/**
 * Float checkpoint in, CodeGEMM checkpoint out.
 *
 * @module
 */
export {
  type MatrixReport,
  quantizeCheckpoint,
  type QuantizeReport,
  type QuantizeRun,
  type QuantizeSettings,
} from "./checkpoint.ts";
export type { CodebookSettings } from "./codebooks.ts";
export { parseFormat } from "./format.ts";
export {
  type MatrixSettings,
  type QuantizedMatrix,
  quantizeMatrix,
  reconstruct,
  type StoredMatrix,
} from "./matrix.ts";
export { createShardWriter, type FileSink, planShards, type ShardWriter } from "./writer.ts";
