/**
 * What both sides of a fleet agree on.
 *
 * @module
 */
export type { Bus, BusMessage, BusStatus, Subscription } from "./bus.ts";
export { type ChatTemplate, createChatTemplate } from "./chat_template.ts";
export * from "./checkpoint/mod.ts";
export { type Clock, sleep, systemClock, VirtualClock } from "./clock.ts";
export { decodeFrame, encodeFrame, stepFrameBytes } from "./codec.ts";
export { FleetError, type FleetErrorCode, toFleetError } from "./errors.ts";
export type * from "./frames.ts";
export { LIMITS } from "./limits.ts";
export { type BusFaults, type MemoryBus, MemoryHub } from "./memory_bus.ts";
export {
  bitsPerWeight,
  type CodeGemmFormat,
  type ModelConfig,
  type TensorSource,
} from "./model_config.ts";
export { describeParts, type ModelManifest, PartTensorSource } from "./parts.ts";
export { subjects, type WorkerCard } from "./protocol.ts";
export { createTokenizer, type StreamDecoder, type TextTokenizer } from "./tokenizer.ts";
