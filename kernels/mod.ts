/**
 * The kernels' door: the GPU, reads from it, the layers' kernels, and what a worker proves and
 * measures when it joins.
 *
 * @module
 */
export { calibrate } from "./calibration.ts";
export * from "./gpu.ts";
export * from "./kernel.ts";
export * from "./linear/mod.ts";
export { Readback, type ReadRange, type ReadSlot } from "./readback.ts";
export * from "./sampling/mod.ts";
export { selfTest, type SelfTestResult } from "./self_test.ts";
export * from "./transformer/mod.ts";
