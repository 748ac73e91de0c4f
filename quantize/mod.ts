/**
 * Float checkpoint in, CodeGEMM checkpoint out.
 *
 * @module
 */
export {
  type CalibratedReport,
  type CalibratedRun,
  type CalibratedSettings,
  quantizeCalibrated,
} from "./calibrated.ts";
export { type CalibrationText, cutSequences } from "./calibration_text.ts";
export { convertAqlm } from "./convert.ts";
export {
  type MatrixReport,
  quantizeCheckpoint,
  type QuantizeReport,
  type QuantizeRun,
  type QuantizeSettings,
} from "./checkpoint.ts";
export type { CodebookSettings } from "./codebooks.ts";
export { parseFormat } from "./format.ts";
export { judge, type Judgement, type JudgeOptions } from "./judge.ts";
export { type Phase, PHASES } from "./phases.ts";
export { describePlan, type GpuPhase, planQuantization, type QuantizationPlan } from "./plan.ts";
export {
  type MatrixSettings,
  type QuantizedMatrix,
  quantizeMatrix,
  reconstruct,
  type StoredMatrix,
} from "./matrix.ts";
export { memoryWork, type WorkFiles } from "./work_files.ts";
export { createShardWriter, type FileSink, planShards, type ShardWriter } from "./writer.ts";
