/**
 * A GPU for the length of a test.
 *
 * @module
 */
import { Gpu, type GpuOptions } from "./gpu.ts";

/**
 * Runs a test with a device of its own, a software adapter's where there is no other.
 *
 * @param limits by default those that WebGPU guarantees
 * @throws what the test throws; FleetError `gpu` when anything went wrong on the device behind its back
 */
export async function withGpu(
  test: (gpu: Gpu) => Promise<void>,
  limits: GpuOptions["limits"] = "default",
): Promise<void> {
  const gpu = await Gpu.open({ software: true, limits });
  try {
    await test(gpu);
    gpu.check();
  } finally {
    gpu.close();
  }
}
