/**
 * The GPU thread: owns the device and the stage on it, and blocks while it waits for them. Nothing
 * else runs here.
 *
 * @module
 */
import { calibrate } from "../kernels/calibration.ts";
import { Gpu } from "../kernels/gpu.ts";
import { selfTest } from "../kernels/self_test.ts";
import { sleep, systemClock } from "../shared/clock.ts";
import { decodeFrame } from "../shared/codec.ts";
import { FleetError, invariant } from "../shared/errors.ts";
import type { GpuCalls } from "./gpu_calls.ts";
import { ModelLoader } from "./model_loader.ts";
import { openParts } from "./part_location.ts";
import { serveThread } from "./thread.ts";
import type { LoadedStage } from "./worker.ts";

/** An idle device is looked after this often; a busy one at every step. */
const WATCH_EVERY_MS = 250;

let gpu: Gpu | null = null;
let loader: ModelLoader | null = null;
let stage: { epoch: number; loaded: LoadedStage } | null = null;

serveThread<GpuCalls>({
  async open({ software }, { tell }) {
    gpu = await Gpu.open({ software });
    tell(`${gpu.info.name}: testing every kernel against its reference`);
    const { digest, ms } = await selfTest(gpu);
    tell(`${gpu.info.name}: measuring`);
    const calibration = await calibrate(gpu);
    loader = new ModelLoader(gpu, systemClock);
    return {
      info: gpu.info,
      maxBindingBytes: gpu.limits.maxStorageBufferBindingSize,
      selfTestDigest: digest,
      selfTestMs: ms,
      calibration,
    };
  },

  async load({ assignment, config, parts }, { tell }) {
    invariant(loader && !stage, "a GPU is open and no stage on it");
    const readable = await openParts(parts);
    const loaded = await loader.load(assignment, config, readable, tell);
    stage = { epoch: assignment.epoch, loaded };
    return { memoryBytes: loaded.memoryBytes };
  },

  async run({ epoch, frame }, { transfer }) {
    if (stage?.epoch !== epoch) {
      throw new FleetError("cancelled", `The stage of epoch ${epoch} is gone`);
    }
    const step = decodeFrame(frame);
    invariant(step.type === "step", "a step is run");
    const output = await stage.loaded.runner.run(step.batch, step.hidden);
    if (output.hidden) transfer.push(output.hidden.buffer);
    return output;
  },

  async unload({ epoch }) {
    if (stage?.epoch !== epoch) return;
    const { loaded } = stage;
    stage = null;
    await loaded.destroy();
  },

  async watch() {
    for (;;) {
      await sleep(systemClock, WATCH_EVERY_MS);
      gpu?.check();
    }
  },
});
