/**
 * The GPU thread of `bench model`: a worker's one, but for the weights, which are random.
 *
 * @module
 */
import { Gpu } from "../kernels/gpu.ts";
import { StageModel, tuneStage, WeightStore } from "../model/mod.ts";
import { systemClock } from "../shared/clock.ts";
import { invariant } from "../shared/errors.ts";
import { stageParts } from "../shared/model_config.ts";
import { modelRunner, type StageRunner } from "../worker/mod.ts";
import { runFrame } from "../worker/step_crossing.ts";
import { serveThread } from "../worker/thread.ts";
import { timeKernels } from "./kernel_times.ts";
import { type ModelCalls, type StepSample, WARM_UP_MS, WARM_UP_STEPS } from "./model_calls.ts";
import { StageBatches } from "./stage_batches.ts";
import { syntheticMatrices, syntheticTensors } from "./synthetic_model.ts";

let loaded: { gpu: Gpu; model: StageModel; batches: StageBatches; runner: StageRunner } | null =
  null;

const mailbox = serveThread<ModelCalls>({
  async load({ spec, software, tune }, { tell }) {
    const gpu = await Gpu.open({ software });
    const store = new WeightStore(gpu);
    const fromMs = performance.now();
    const { config } = spec;
    for (const part of stageParts(spec)) {
      await store.load(config, part, syntheticTensors(config), part, syntheticMatrices(gpu));
    }
    let tuned: string | null = null;
    const memory = {
      read: () => Promise.resolve(tuned),
      write: (text: string) => Promise.resolve(void (tuned = text)),
    };
    const variants = tune ? await tuneStage(gpu, spec, store, memory) : undefined;
    if (tuned !== null) tell(`tuned: ${tuned}`);
    const model = await StageModel.load(gpu, { ...spec, variants }, store);
    const runner = modelRunner(model, systemClock, mailbox);
    loaded = { gpu, model, runner, batches: new StageBatches(spec) };
    return {
      adapter: gpu.info.name,
      memoryBytes: model.memoryBytes,
      loadSeconds: (performance.now() - fromMs) / 1000,
    };
  },

  async direct({ kind, rows, context, steps }) {
    invariant(loaded, "a model is loaded");
    const { runner, batches } = loaded;
    const hidden = batches.hidden(rows);
    const samples: StepSample[] = [];
    const make = (step: number) =>
      kind === "decode" ? batches.decode(rows, context + step) : batches.prefill(rows);
    // Made beforehand: a worker's come as frames, and what is between two steps is measured.
    const measured = Array.from({ length: steps }, (_, step) => make(step));
    const warmUp = kind === "decode" ? WARM_UP_STEPS : 1;
    const warmMs = performance.now() + WARM_UP_MS;
    let endedMs = performance.now();
    for (let step = 0; step < warmUp || endedMs < warmMs; step++) {
      await runner.run(make(0), hidden);
      endedMs = performance.now();
    }
    for (const batch of measured) {
      const beganMs = performance.now();
      const running = runner.run(batch, hidden);
      const encodeMs = performance.now() - beganMs;
      const { gpuMs, readbackMs, gpuIdleMs = null } = await running;
      const nowMs = performance.now();
      samples.push({ stepMs: nowMs - endedMs, gpuMs, encodeMs, readbackMs, idleMs: gpuIdleMs });
      endedMs = nowMs;
    }
    return samples;
  },

  async profile({ rows, context }) {
    invariant(loaded, "a model is loaded");
    const { gpu, model, batches } = loaded;
    const hidden = batches.hidden(rows);
    const step = async (position: number) => {
      await model.finish(model.submit(batches.decode(rows, position), hidden));
    };
    // A step of another kind goes before: whatever was encoded ahead is not what is measured.
    await step(0);
    return await timeKernels(gpu, () => step(context));
  },

  async run({ frame }, { transfer }) {
    invariant(loaded, "a model is loaded");
    return await runFrame(loaded.runner, frame, transfer);
  },
});
