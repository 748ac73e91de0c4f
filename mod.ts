/**
 * codegemm-fleet as a library: the pieces that the commands are made of, without their processes.
 *
 * - {@linkcode Fleet} and {@linkcode createApi}: a coordinator over any {@linkcode Bus}
 * - {@linkcode FleetWorker} and {@linkcode ModelLoader}: a worker over any bus, on this thread's GPU
 * - {@linkcode StageModel}: a run of layers on a GPU, steps in and activations or tokens out
 * - {@linkcode planStages}: which worker would hold what, and how fast that would be
 *
 * @example Bits per weight of a format
 * ```ts
 * import { bitsPerWeight } from "./mod.ts";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(bitsPerWeight({ m: 1, v: 4, g: 128, b: 8 }), 2.125);
 * ```
 *
 * @module
 */
export * from "./coordinator/mod.ts";
export { Gpu, type GpuInfo, type GpuOptions } from "./kernels/mod.ts";
export {
  StageChain,
  StageModel,
  type StageOutput,
  type StageSpec,
  WeightStore,
} from "./model/mod.ts";
export * from "./shared/mod.ts";
export {
  createStage,
  FleetWorker,
  ModelLoader,
  type PartProvider,
  type StageLoader,
  type WorkerOptions,
} from "./worker/mod.ts";
