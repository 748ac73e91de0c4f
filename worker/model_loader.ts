/**
 * Stages of a real model on the GPU of this thread: parts onto it, steps through it.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import { StageModel } from "../model/stage_model.ts";
import type { StageOutput, StageSpec, StageSteps } from "../model/stage_spec.ts";
import { tuneStage, type TuningMemory } from "../model/tuning.ts";
import { warmUp } from "../model/warm_up.ts";
import { WeightStore } from "../model/weights.ts";
import type { Clock } from "../shared/clock.ts";
import { FleetError, toFleetError } from "../shared/errors.ts";
import type { StepBatch } from "../shared/frames.ts";
import type { ModelConfig, PartName, TensorSource } from "../shared/model_config.ts";
import type { AssignStage } from "../shared/protocol.ts";
import type { RunnerOutput, StageRunner } from "./stage.ts";
import type { Mailbox } from "./thread.ts";
import type { LoadedStage, LoadNote, PartOrigin, StageLoader } from "./worker.ts";

/** A part that can be read. */
export interface ReadablePart {
  from: PartOrigin;
  tensors: TensorSource;
}

/** Loads stages onto one GPU. The weights of the last assignment stay there for the next. */
export class ModelLoader implements StageLoader<ReadablePart> {
  readonly #gpu: Gpu;
  readonly #clock: Clock;
  readonly #weights: WeightStore;
  readonly #tuning: TuningMemory | null;
  readonly #mailbox: Mailbox | undefined;

  /**
   * @param tuning where kernel variants are remembered; without it the defaults run
   * @param mailbox of the thread that all this runs on, where it has one of its own
   */
  constructor(gpu: Gpu, clock: Clock, tuning: TuningMemory | null = null, mailbox?: Mailbox) {
    this.#gpu = gpu;
    this.#clock = clock;
    this.#tuning = tuning;
    this.#mailbox = mailbox;
    this.#weights = new WeightStore(gpu);
  }

  async load(
    assignment: AssignStage,
    config: ModelConfig,
    parts: ReadablePart[],
    tell: (note: LoadNote) => void,
  ): Promise<LoadedStage> {
    const { stage, limits, profile } = assignment;
    const digests = new Map(
      assignment.parts.map(({ part, digest }) => [part as PartName, digest]),
    );
    this.#weights.keepOnly(new Set(digests.values()));
    for (const [index, { part, digest, bytes }] of assignment.parts.entries()) {
      const { from, tensors } = parts[index];
      const held = this.#weights.has(digest);
      if (!held) {
        tell({ type: "part", progress: { part, doneBytes: 0, from } });
        await this.#weights.load(config, part as PartName, tensors, digest);
      }
      tell({ type: "part", progress: { part, doneBytes: bytes, from: held ? "gpu" : from } });
    }
    const untuned: StageSpec = { config, ...stage, limits, profile, parts: digests };
    let last = "";
    const say = (line: string) => {
      if (line !== last) tell({ type: "line", line: last = line });
    };
    const spec = { ...untuned, variants: await this.#tuned(untuned, say) };
    const model = await StageModel.load(this.#gpu, spec, this.#weights, ({ what }) => say(what));
    try {
      await warmUp(model, spec, this.#gpu.info.software);
    } catch (error) {
      model.destroy();
      throw error;
    }
    const runner = modelRunner(model, this.#clock, this.#mailbox);
    return {
      runner,
      memoryBytes: model.memoryBytes,
      // Buffers that the GPU still works on must not be destroyed: that is an error of the device.
      destroy: async () => {
        await runner.drain();
        model.destroy();
      },
    };
  }

  /** What cannot be tried (memory is short, the disk is full) runs by default: tuning is a bonus. */
  async #tuned(spec: StageSpec, say: (line: string) => void): Promise<StageSpec["variants"]> {
    if (!this.#tuning) return undefined;
    try {
      return await tuneStage(this.#gpu, spec, this.#weights, this.#tuning, say);
    } catch (error) {
      this.#gpu.check();
      say(`kernels run untuned: ${toFleetError(error).message}`);
      return undefined;
    }
  }
}

/** A wait as short as this is not halved any more. */
const SHORT_WAIT_MS = 0.1;

/** A runner that can be brought to rest. */
export interface DrainableRunner extends StageRunner {
  /** Takes no more steps; resolves when those it has are done. */
  drain(): Promise<void>;
}

/**
 * A model as a runner. What is to be gained and lost here is the time between two steps, in which the
 * GPU idles:
 *
 * - A step that comes while another one runs is checked, written and encoded at once; the model
 *   submits it the moment the wait for the older one is over. So no step should come too late for
 *   that: in a busy pipeline the next one is on its way while this one runs (one microbatch of two
 *   waits for its tokens while the other one is here), some tenths of a millisecond behind the last
 *   result. But a thread that blocks on the GPU takes no message.
 * - So the thread blocks on its mailbox instead, for as long as the GPU will surely still be at work
 *   ({@linkcode StageSteps.busyForMs}), and turns to the GPU just before the end.
 * - A step that has nobody behind it is read the moment it is done, for the wait on the GPU begins
 *   before its end in any case.
 * - What can be done before the next step is known, is done first: encoding its layers as if it were
 *   like this one. What a step leaves behind is cleared away while its last layers still run: each
 *   wait takes half of the time that is left, so that one ends shortly before the step does, whatever
 *   it takes.
 *
 * @param mailbox of the GPU's own thread; without one, the messages that have arrived are let in once
 * per step
 */
export function modelRunner(
  model: StageSteps,
  clock: Clock,
  mailbox?: Mailbox,
): DrainableRunner {
  let tail: Promise<unknown> = Promise.resolve();
  let freeAtMs = 0;
  let draining = false;
  const letStepsIn = async () => {
    if (!mailbox) return await turnOfEvents();
    await mailbox.wait(0);
    model.prepare();
    for (let ms = model.busyForMs(); ms > 0 && !draining; ms = model.busyForMs()) {
      await mailbox.wait(ms < SHORT_WAIT_MS ? ms : ms / 2);
      model.settle();
    }
  };
  const run = async (batch: StepBatch, hidden: Uint16Array | null): Promise<RunnerOutput> => {
    if (draining) throw new FleetError("cancelled", "The stage is being taken down");
    const submittedAtMs = clock.unixMs();
    const ticket = model.submit(batch, hidden);
    const turn = tail.then(async (): Promise<RunnerOutput> => {
      await letStepsIn();
      const startedAtMs = Math.max(submittedAtMs, freeAtMs);
      const output: StageOutput = await model.finish(ticket);
      freeAtMs = clock.unixMs();
      return { ...output, startedAtMs };
    });
    tail = turn.catch(() => {});
    return await turn;
  };
  const drain = async () => {
    draining = true;
    await tail;
  };
  return { run, drain };
}

/** Resolves after the messages that have arrived by now. Timers would wait a millisecond or more. */
function turnOfEvents(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      port2.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
