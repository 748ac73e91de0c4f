/**
 * One epoch at work: steps out of the scheduler go to stage 0, results come back from the last stage,
 * and the ledger says what to send again. The shell around both: it owns the subjects and the clock.
 *
 * @module
 */
import type { Bus, Subscription } from "../shared/bus.ts";
import type { Clock } from "../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import type { FrameOrder, ResultFrame } from "../shared/frames.ts";
import { COORDINATOR, type Subjects } from "../shared/protocol.ts";
import { PlanLatency } from "./latency.ts";
import { Ledger, type Reissue } from "./ledger.ts";
import type { ScheduledStep, Scheduler, SchedulerEvent } from "./scheduler.ts";

/** What a pipeline is made of. */
export interface PipelineOptions {
  bus: Bus;
  clock: Clock;
  subjects: Subjects;
  epoch: number;
  /** Worker names in the order of the stages. */
  workers: readonly string[];
  scheduler: Scheduler;
  /** How far each stage's clock runs ahead of ours, ms. */
  offsetsMs: () => number[];
  onEvents: (events: SchedulerEvent[]) => void;
  /** Something worth a line in the fleet's log. */
  onNote: (text: string) => void;
  /** The pipeline has given up: make another plan. */
  onFailed: (error: FleetError) => void;
}

/** A step that has been issued, with when it was first. */
interface SentStep extends ScheduledStep {
  issuedAtMs: number;
}

/** The coordinator's end of a pipeline. */
export class Pipeline {
  readonly epoch: number;
  readonly latency: PlanLatency;
  /** When the last step completed, by the clock's monotonic time; null before the first. */
  lastStepAtMs: number | null = null;
  /** Frames that were not taken, by reason. */
  readonly dropped: Record<string, number> = {};
  readonly #options: PipelineOptions;
  readonly #ledger: Ledger<SentStep>;
  readonly #subscription: Subscription;
  #state: "open" | "failed" | "closed" = "open";

  constructor(options: PipelineOptions) {
    const { bus, subjects, epoch, workers } = options;
    this.#options = options;
    this.epoch = epoch;
    this.latency = new PlanLatency(workers.length);
    this.#ledger = new Ledger(epoch);
    this.#subscription = bus.subscribe(
      subjects.step(COORDINATOR, workers[workers.length - 1], epoch),
      ({ data }) => this.#receive(data),
    );
  }

  get attempt(): number {
    return this.#ledger.attempt;
  }

  get stepsInFlight(): number {
    return this.#ledger.size;
  }

  /** Steps that were sent again. */
  get reissues(): number {
    return this.#ledger.reissues;
  }

  /** Sends as many steps as may be in flight. */
  pump(): void {
    if (this.#state !== "open") return;
    const { scheduler, clock } = this.#options;
    for (let step = scheduler.nextStep(); step; step = scheduler.nextStep()) {
      const nowMs = clock.nowMs();
      const sent = { ...step, issuedAtMs: clock.unixMs() };
      this.#send(this.#ledger.issue(step.step, sent, nowMs), sent);
    }
  }

  /** A stage misses a step. */
  gap(worker: string, report: { epoch: number; attempt: number; expected: number }): void {
    if (this.#state !== "open" || !this.#ledger.isCurrent(report)) return;
    this.#raise(`${worker} misses step ${report.expected}`);
  }

  /** Steps that are overdue are sent again. To be called every now and then. */
  tick(): void {
    if (this.#state !== "open" || !this.#ledger.expired(this.#options.clock.nowMs())) return;
    this.#raise("a step is overdue");
  }

  /** The bus was away: what was on its way is lost. */
  reconnected(): void {
    if (this.#state === "open" && this.#ledger.size > 0) this.#raise("the bus was away");
  }

  /** Sends and takes nothing more; idempotent. */
  close(): void {
    this.#state = "closed";
    this.#subscription.unsubscribe();
  }

  #send(order: FrameOrder, step: SentStep): void {
    const { bus, subjects, workers, clock } = this.#options;
    const frame = encodeFrame({
      type: "step",
      ...order,
      issuedAtMs: clock.unixMs(),
      batch: step.batch,
      hidden: null,
      traces: [],
    });
    bus.publish(subjects.step(workers[0], COORDINATOR, order.epoch), frame);
  }

  #receive(data: Uint8Array): void {
    if (this.#state !== "open") return;
    const frame = resultFrame(data);
    if (!frame) return this.#drop("malformed");
    const { clock } = this.#options;
    const nowMs = clock.nowMs();
    const verdict = this.#ledger.accept(frame, nowMs);
    switch (verdict.type) {
      case "accepted":
        this.#complete(verdict.step, frame, nowMs);
        break;
      case "gap":
        this.#raise("a result was lost");
        break;
      case "duplicate":
      case "stale":
      case "early":
        this.#drop(verdict.type);
        break;
      default:
        verdict satisfies never;
    }
  }

  #complete(step: SentStep, frame: ResultFrame, nowMs: number): void {
    const { scheduler, clock, offsetsMs, onEvents } = this.#options;
    let events: SchedulerEvent[];
    try {
      events = scheduler.complete(step.step, frame.results);
    } catch (error) {
      if (!(error instanceof FleetError)) throw error;
      // The last stage answered something else than was asked: it cannot be trusted with more.
      return this.#fail(error);
    }
    this.lastStepAtMs = nowMs;
    const decodeOnly = step.batch.decodeRows === step.batch.rowToken.length;
    this.latency.add(frame.traces, offsetsMs(), frame.issuedAtMs, clock.unixMs(), decodeOnly);
    this.pump();
    onEvents(events);
  }

  #raise(why: string): void {
    const reissue: Reissue<SentStep> = this.#ledger.raise(this.#options.clock.nowMs());
    if (reissue.type === "failed") return this.#fail(reissue.error);
    this.#options.onNote(
      `${why}: attempt ${reissue.attempt}, ${reissue.steps.length} steps are sent again`,
    );
    for (const { order, step } of reissue.steps) this.#send(order, step);
  }

  #fail(error: FleetError): void {
    if (this.#state !== "open") return;
    this.#state = "failed";
    this.#options.onFailed(error);
  }

  #drop(reason: string): void {
    this.dropped[reason] = (this.dropped[reason] ?? 0) + 1;
  }
}

function resultFrame(data: Uint8Array): ResultFrame | null {
  try {
    const frame = decodeFrame(data);
    return frame.type === "result" ? frame : null;
  } catch {
    return null;
  }
}
