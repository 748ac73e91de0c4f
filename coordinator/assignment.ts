/**
 * Getting a plan onto its workers: every stage is asked, every answer and every `ready` awaited.
 *
 * @module
 */
import type { Bus } from "../shared/bus.ts";
import { type Clock, sleep, type Timer } from "../shared/clock.ts";
import { FleetError, invariant, toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import { type PartName, stageParts } from "../shared/model_config.ts";
import {
  type AssignStage,
  ControlReply,
  COORDINATOR,
  decodeControl,
  encodeControl,
  type NumericsProfile,
  type PartRef,
  PROTOCOL_VERSION,
  type Subjects,
} from "../shared/protocol.ts";
import type { FleetModel } from "./fleet_options.ts";
import type { Plan } from "./planner.ts";
import type { StageReport } from "./roster.ts";

/** A stage of the plan and who shall serve it. */
export interface AssignedStage {
  worker: string;
  request: AssignStage;
}

/**
 * What each stage of a plan is asked to load and serve.
 *
 * @throws Error when the model lacks a part that the plan places: a defect of ours
 */
export function assignRequests(
  epoch: number,
  plan: Plan,
  model: Pick<FleetModel, "configJson" | "digest" | "parts">,
  profile: NumericsProfile,
): AssignedStage[] {
  const refs = new Map<string, PartRef>(model.parts.map((ref) => [ref.part, ref]));
  const partRef = (name: PartName) => {
    const ref = refs.get(name);
    invariant(ref, `the model has a part ${name}`);
    return ref;
  };
  return plan.stages.map((stage, index) => ({
    worker: stage.worker,
    request: {
      type: "assign",
      version: PROTOCOL_VERSION,
      instance: stage.instance,
      epoch,
      config: model.configJson,
      modelDigest: model.digest,
      stage: {
        index,
        stages: plan.stages.length,
        from: stage.from,
        to: stage.to,
        first: stage.first,
        last: stage.last,
      },
      previous: plan.stages[index - 1]?.worker ?? COORDINATOR,
      next: plan.stages[index + 1]?.worker ?? COORDINATOR,
      parts: stageParts(stage).map(partRef),
      limits: plan.limits,
      profile,
    },
  }));
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

/** The bus may lose a request or its answer, and a worker be away for a moment. */
const ASK_TIMES = 5;
const ASK_AGAIN_MS = 500;
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
  report(worker: string, report: StageReport): void {
    const stage = this.#stages.find((stage) => stage.worker === worker);
    if (this.#over || !stage || report.instance !== stage.request.instance) return;
    if (report.epoch !== this.epoch) return;
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
        this.#progressed(worker, report);
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

  #progressed(worker: string, report: Extract<StageReport, { type: "progress" }>): void {
    const note = `loads ${report.part} from ${SOURCE_WORDS[report.from]}`;
    const before = this.progress.get(worker);
    const { doneBytes, totalBytes } = report;
    this.progress.set(worker, { doneBytes, totalBytes, note });
    // Saying the same again is no progress.
    if (doneBytes !== before?.doneBytes || note !== before.note) this.#watch(worker);
  }

  /** Asks until an answer comes: a worker that has the request already just says so again. */
  async #ask(bus: Bus, subjects: Subjects, { worker, request }: AssignedStage): Promise<void> {
    const bytes = encodeControl(request);
    for (let times = 1; !this.#over; times++) {
      try {
        const answer = await bus.request(subjects.ctl(worker), bytes, LIMITS.controlTimeoutMs);
        const reply = decodeControl(ControlReply, answer);
        if (reply.type !== "refused") return;
        return this.#fail(worker, new FleetError("unavailable", `it refuses: ${reply.reason}`));
      } catch (error) {
        const failure = toFleetError(error);
        const mayPass = failure.code === "nats" || failure.code === "timeout";
        if (!mayPass || times >= ASK_TIMES) return this.#fail(worker, failure);
      }
      await sleep(this.#clock, ASK_AGAIN_MS);
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
