/**
 * A stage: frames in, frames out. It takes the steps that {@linkcode judgeFrame} lets through, hands
 * at most two at a time to its runner, and sends each on: as a step with activations to the next
 * stage, or as a result to the coordinator.
 *
 * The first failure of the runner is its last: the stage reports `failed` and touches no frame again.
 *
 * @module
 */
import type { StageOutput } from "../model/stage_spec.ts";
import type { Bus, BusMessage } from "../shared/bus.ts";
import type { Clock } from "../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import { FleetError, toFleetError } from "../shared/errors.ts";
import type { FrameOrder, StepBatch, StepFrame } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import {
  type AssignStage,
  encodeControl,
  type Subjects,
  type WorkerReport,
} from "../shared/protocol.ts";
import { misfit, type StageBounds } from "./stage_bounds.ts";
import {
  type DropReason,
  judgeFrame,
  judgeSubject,
  openInbox,
  type StageInbox,
} from "./stage_inbox.ts";

/** A step's outputs, and when the GPU turned to it. */
export interface RunnerOutput extends StageOutput {
  /** The worker's clock, ms since the Unix epoch. */
  startedAtMs: number;
}

/** What runs the steps of a stage: a model on this thread, on another one, or a simulated one. */
export interface StageRunner {
  /**
   * Queues a step; those before it run first. The stage has at most
   * `LIMITS.maxStepsInFlightPerStage` unfinished.
   *
   * @param hidden float16 bits `(rows, hiddenSize)`; null for the first stage
   * @throws (rejects) FleetError when the stage cannot go on
   */
  run(batch: StepBatch, hidden: Uint16Array | null): Promise<RunnerOutput>;
}

/** Frames dropped so far, by reason: what the beats carry. */
export type DropCounts = Record<string, number>;

/** What a stage is made of. */
export interface StageOptions {
  bus: Bus;
  clock: Clock;
  subjects: Subjects;
  /** The worker's own name in subjects, and its process. */
  worker: string;
  instance: string;
  assignment: Pick<AssignStage, "epoch" | "stage" | "previous" | "next" | "limits">;
  config: Pick<ModelConfig, "hiddenSize" | "vocabSize">;
  runner: StageRunner;
  /** Counted into; a worker keeps one over all its stages. */
  dropped?: DropCounts;
  /** After the failure has been reported. */
  onFailure?: (error: FleetError) => void;
}

/** A stage at work. */
export interface Stage {
  readonly epoch: number;
  /** Frames dropped so far, by reason. */
  readonly dropped: Readonly<DropCounts>;
  /** Stops listening and sending; steps at the runner end unheard. Idempotent. */
  close(): void;
}

interface Work {
  frame: StepFrame;
  receivedAtMs: number;
}

/**
 * Starts a stage: from now on it listens on its worker's step subjects.
 *
 * @example
 * ```ts ignore
 * const stage = createStage({
 *   bus, clock: systemClock, subjects: subjects("fleet"), worker: "w1", instance: "i1",
 *   assignment, config, runner: modelRunner(model, systemClock),
 * });
 * ```
 */
export function createStage(options: StageOptions): Stage {
  return new BusStage(options);
}

class BusStage implements Stage {
  readonly epoch: number;
  readonly dropped: DropCounts;
  readonly #options: StageOptions;
  readonly #bounds: StageBounds;
  readonly #subscription: { unsubscribe(): void };
  #inbox: StageInbox;
  #queue: Work[] = [];
  /** At the runner, oldest first. */
  #running: { work: Work; output: Promise<RunnerOutput> }[] = [];
  #sending = false;
  #state: "open" | "failed" | "closed" = "open";

  constructor(options: StageOptions) {
    const { assignment, bus, subjects, worker } = options;
    this.#options = options;
    this.epoch = assignment.epoch;
    this.dropped = options.dropped ?? {};
    this.#bounds = {
      limits: assignment.limits,
      config: options.config,
      first: assignment.stage.first,
    };
    this.#inbox = openInbox(assignment.epoch, assignment.previous);
    this.#subscription = bus.subscribe(
      subjects.step(worker, "*", "*"),
      (message) => this.#receive(message),
    );
  }

  close(): void {
    this.#state = "closed";
    this.#subscription.unsubscribe();
    this.#queue = [];
  }

  #receive({ subject, data }: BusMessage): void {
    const receivedAtMs = this.#options.clock.unixMs();
    if (this.#state === "closed") return;
    if (this.#state === "failed") return this.#drop("failed");
    const [from, epoch] = subject.split(".").slice(-2);
    const stranger = judgeSubject(this.#inbox, from, Number(epoch));
    if (stranger) return this.#drop(stranger);
    const frame = stepFrame(data);
    if (!frame) return this.#drop("malformed");
    if (misfit(frame, this.#bounds)) return this.#drop("out-of-bounds");

    const room = this.#queue.length + this.#running.length < LIMITS.maxQueuedFramesPerStage;
    const { inbox, decision } = judgeFrame(this.#inbox, frame, room);
    this.#inbox = inbox;
    if (decision.supersedes) {
      for (const _ of this.#queue) this.#drop("superseded");
      this.#queue = [];
    }
    if (decision.type === "apply") {
      this.#queue.push({ frame, receivedAtMs });
      this.#submit();
      return;
    }
    this.#drop(decision.reason);
    if (decision.gap) this.#report({ type: "gap", ...this.#names(), ...decision.gap });
  }

  #submit(): void {
    while (this.#running.length < LIMITS.maxStepsInFlightPerStage) {
      const work = this.#queue.shift();
      if (!work) break;
      const { batch, hidden } = work.frame;
      const output = this.#options.runner.run(batch, hidden);
      // Awaited in its turn, below; until then a rejection must not count as unhandled.
      output.catch(() => {});
      this.#running.push({ work, output });
    }
    if (!this.#sending) this.#send();
  }

  /** Sends outputs on in the order of their steps. */
  async #send(): Promise<void> {
    this.#sending = true;
    try {
      while (this.#running.length > 0) {
        const { work, output } = this.#running[0];
        const done = await output;
        if (this.#state !== "open") return;
        checkResults(done);
        this.#running.shift();
        this.#submit();
        this.#publish(work, done);
      }
    } catch (error) {
      this.#fail(toFleetError(error));
    } finally {
      this.#sending = false;
    }
  }

  #publish({ frame, receivedAtMs }: Work, output: RunnerOutput): void {
    const { bus, clock, subjects, worker, assignment } = this.#options;
    const { epoch, attempt, attemptBase, step } = frame satisfies FrameOrder;
    const trace = {
      receivedAtMs,
      startedAtMs: output.startedAtMs,
      gpuMs: output.gpuMs,
      readbackMs: output.readbackMs,
      sentAtMs: clock.unixMs(),
    };
    const head = {
      epoch,
      attempt,
      attemptBase,
      step,
      issuedAtMs: frame.issuedAtMs,
      traces: [...frame.traces, trace],
    };
    const sent = assignment.stage.last
      ? encodeFrame({ type: "result", ...head, results: output.results })
      : encodeFrame({ type: "step", ...head, batch: frame.batch, hidden: output.hidden });
    bus.publish(subjects.step(assignment.next, worker, epoch), sent);
  }

  #fail(error: FleetError): void {
    if (this.#state !== "open") return;
    this.#state = "failed";
    this.#queue = [];
    const message = error.message.slice(0, 4096);
    this.#report({ type: "failed", ...this.#names(), code: error.code, message });
    this.#options.onFailure?.(error);
  }

  #report(report: WorkerReport): void {
    const { bus, subjects, worker } = this.#options;
    if (bus.status === "closed") return;
    bus.publish(subjects.report(worker), encodeControl(report));
  }

  #names() {
    return { instance: this.#options.instance, epoch: this.epoch };
  }

  #drop(reason: DropReason): void {
    this.dropped[reason] = (this.dropped[reason] ?? 0) + 1;
  }
}

/**
 * Outputs that are no numbers would be refused as a frame; here it can be said what is wrong.
 *
 * @throws FleetError `internal`
 */
function checkResults({ results }: RunnerOutput): void {
  for (const result of results) {
    if (result.type === "logits") continue;
    const alternatives = result.type === "sample" ? result.alternativeLogprobs : [];
    const figures = [result.logprob, ...alternatives];
    // Minus infinity is a token that was ruled out.
    if (figures.every((figure) => figure < Infinity)) continue;
    throw new FleetError(
      "internal",
      `The log-probabilities of a row are not numbers (${
        figures[0]
      }): the model's weights or the ` +
        "GPU's arithmetic are damaged",
    );
  }
}

/** The step frame in these bytes; null when they hold none. */
function stepFrame(data: Uint8Array): StepFrame | null {
  try {
    const frame = decodeFrame(data);
    return frame.type === "step" ? frame : null;
  } catch {
    return null;
  }
}
