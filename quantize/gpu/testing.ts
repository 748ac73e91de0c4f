/**
 * A recorder on whatever adapter there is, for tests.
 *
 * @module
 */
import { Gpu } from "../../kernels/gpu.ts";
import { Recorder } from "./operation.ts";

/** Runs `work` with a recorder at WebGPU's default limits, and frees everything after it. */
export async function withRecorder(work: (recorder: Recorder) => Promise<void>): Promise<void> {
  const gpu = await Gpu.open({ software: true, limits: "default" });
  const recorder = new Recorder(gpu);
  try {
    await work(recorder);
  } finally {
    recorder.destroy();
    gpu.close();
  }
}
