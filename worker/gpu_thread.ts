/**
 * The GPU thread: owns the device and the stage on it, and blocks while it waits for them. Nothing
 * else runs here.
 *
 * @module
 */
import { dirname } from "node:path";
import { calibrate } from "../kernels/calibration.ts";
import { Gpu } from "../kernels/gpu.ts";
import { selfTest } from "../kernels/self_test.ts";
import { sleep, systemClock } from "../shared/clock.ts";
import { FleetError, invariant } from "../shared/errors.ts";
import type { TuningMemory } from "../model/tuning.ts";
import type { GpuCalls } from "./gpu_calls.ts";
import { ModelLoader } from "./model_loader.ts";
import { openParts } from "./part_location.ts";
import { runFrame } from "./step_crossing.ts";
import { serveThread } from "./thread.ts";
import type { LoadedStage } from "./worker.ts";

/** An idle device is looked after this often; a busy one at every step. */
const WATCH_EVERY_MS = 250;

let gpu: Gpu | null = null;
let loader: ModelLoader | null = null;
let stage: { epoch: number; loaded: LoadedStage } | null = null;

/** Choices that cannot be read or kept are made again: nothing but time is lost. */
function fileMemory(path: string): TuningMemory {
  return {
    read: () => Deno.readTextFile(path).catch(() => null),
    async write(text) {
      try {
        await Deno.mkdir(dirname(path), { recursive: true });
        await Deno.writeTextFile(`${path}.${Deno.pid}`, text);
        await Deno.rename(`${path}.${Deno.pid}`, path);
      } catch (error) {
        console.error(`Cannot keep the chosen kernels in ${path}: ${error}`);
      }
    },
  };
}

const mailbox = serveThread<GpuCalls>({
  async open({ software, tuningFile }, { tell }) {
    gpu = await Gpu.open({ software });
    tell(`${gpu.info.name}: testing every kernel against its reference`);
    const { digest, ms } = await selfTest(gpu);
    tell(`${gpu.info.name}: measuring`);
    const calibration = await calibrate(gpu);
    // A software adapter runs the defaults: it has little speed to gain.
    const tuning = gpu.info.software ? null : fileMemory(tuningFile);
    loader = new ModelLoader(gpu, systemClock, tuning, mailbox);
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
    return await runFrame(stage.loaded.runner, frame, transfer);
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
