/**
 * Getting a plan onto its workers: every stage is asked, every answer and every `ready` awaited.
 *
 * @module
 */
import type { Bus } from "../shared/bus.ts";
import type { Clock, Timer } from "../shared/clock.ts";
import { FleetError, toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import {
  type AssignStage,
  ControlReply,
  decodeControl,
  encodeControl,
  type Subjects,
  type WorkerReport,
} from "../shared/protocol.ts";

/** A stage of the plan and who shall serve it. */
export interface AssignedStage {
  worker: string;
  request: AssignStage;
}

/** How an assignment ended for good or ill. */
export type AssignmentOutcome =
  | { type: "ready" }
  /** `worker` cannot or will not serve: plan without it. */
  | { type: "failed"; worker: string; error: FleetError };

/** How far a stage's loading is. */
export interface LoadProgress {
  doneBytes: number;
  totalBytes: number;
  /** What is being loaded and from where, in words. */
  note: string;
}

/** A worker that neither moves bytes nor gets ready for this long has failed. */
const STALLED_AFTER_MS = 120_000;

/** One plan on its way to its workers. Calls `onOutcome` exactly once, unless cancelled before. */
export class Assignment {
  readonly epoch: number;
  readonly progress = new Map<string, LoadProgress>();
  readonly #stages: readonly AssignedStage[];
  readonly #clock: Clock;
  readonly #onOutcome: (outcome: AssignmentOutcome) => void;
  readonly #ready = new Set<string>();
  #stalled = new Map<string, Timer>();
  #over = false;

  constructor(options: {
    bus: Bus;
    clock: Clock;
    subjects: Subjects;
    epoch: number;
    stages: readonly AssignedStage[];
    onOutcome: (outcome: AssignmentOutcome) => void;
  }) {
    this.epoch = options.epoch;
    this.#stages = options.stages;
    this.#clock = options.clock;
    this.#onOutcome = options.onOutcome;
    for (const stage of options.stages) {
      this.#watch(stage.worker);
      this.#ask(options.bus, options.subjects, stage);
    }
  }

  /** A worker's report; those of other workers, instances and epochs are not for us. */
  report(worker: string, report: WorkerReport): void {
    const stage = this.#stages.find((stage) => stage.worker === worker);
    if (this.#over || !stage || report.instance !== stage.request.instance) return;
    if (!("epoch" in report) || report.epoch !== this.epoch) return;
    switch (report.type) {
      case "ready":
        this.#ready.add(worker);
        this.#stalled.get(worker)?.cancel();
        if (this.#ready.size === this.#stages.length) this.#end({ type: "ready" });
        break;
      case "failed":
        this.#fail(worker, new FleetError("unavailable", report.message));
        break;
      case "progress":
        this.progress.set(worker, {
          doneBytes: report.doneBytes,
          totalBytes: report.totalBytes,
          note: `loads ${report.part} from ${SOURCE_WORDS[report.from]}`,
        });
        this.#watch(worker);
        break;
      case "gap":
        break;
      default:
        report satisfies never;
    }
  }

  /** No outcome will be told. */
  cancel(): void {
    this.#over = true;
    for (const timer of this.#stalled.values()) timer.cancel();
  }

  async #ask(bus: Bus, subjects: Subjects, { worker, request }: AssignedStage): Promise<void> {
    try {
      const bytes = encodeControl(request);
      const answer = await bus.request(subjects.ctl(worker), bytes, LIMITS.controlTimeoutMs);
      const reply = decodeControl(ControlReply, answer);
      if (reply.type === "refused") {
        this.#fail(worker, new FleetError("unavailable", reply.reason));
      }
    } catch (error) {
      this.#fail(worker, toFleetError(error));
    }
  }

  #watch(worker: string): void {
    this.#stalled.get(worker)?.cancel();
    const seconds = STALLED_AFTER_MS / 1000;
    const error = new FleetError("timeout", `it made no progress with loading for ${seconds} s`);
    const timer = this.#clock.after(STALLED_AFTER_MS, () => this.#fail(worker, error));
    this.#stalled.set(worker, timer);
  }

  #fail(worker: string, error: FleetError): void {
    this.#end({ type: "failed", worker, error });
  }

  #end(outcome: AssignmentOutcome): void {
    if (this.#over) return;
    this.cancel();
    this.#onOutcome(outcome);
  }
}

const SOURCE_WORDS = {
  gpu: "its GPU memory",
  disk: "its disk",
  cache: "its cache",
  store: "the object store",
} as const;
