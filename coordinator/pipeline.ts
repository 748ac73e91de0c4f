/**
 * One epoch at work: steps out of the scheduler go to stage 0, results come back from the last stage,
 * and the ledger says what to send again. The shell around both: it owns the subjects and the clock.
 *
 * @module
 */
import type { Bus, BusMessage, Subscription } from "../shared/bus.ts";
import type { Clock } from "../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import type { FrameOrder, ResultFrame } from "../shared/frames.ts";
import { COORDINATOR, type Subjects } from "../shared/protocol.ts";
import type { Rejections } from "./fleet_log.ts";
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
  /** Tokens are below it. */
  vocabSize: number;
  /** How far each stage's clock runs ahead of ours, ms. */
  offsetsMs: () => number[];
  onEvents: (events: SchedulerEvent[]) => void;
  /** Something worth a line in the fleet's log. */
  onNote: (text: string) => void;
  /**
   * The pipeline has given up: make another plan.
   *
   * @param culprit the worker that is to blame, null when nobody knows
   */
  onFailed: (error: FleetError, culprit: string | null) => void;
  /** Counts the frames that are not taken. */
  rejections: Rejections;
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
  readonly #options: PipelineOptions;
  readonly #ledger: Ledger<SentStep>;
  readonly #subscription: Subscription;
  #state: "open" | "failed" | "closed" = "open";
  /** A gap that has been reported and not acted upon yet, in words. */
  #gap: string | null = null;

  constructor(options: PipelineOptions) {
    const { bus, subjects, epoch, workers } = options;
    this.#options = options;
    this.epoch = epoch;
    this.latency = new PlanLatency(workers.length);
    this.#ledger = new Ledger(epoch);
    this.#subscription = bus.subscribe(
      subjects.step(COORDINATOR, "*", "*"),
      (message) => this.#receive(message),
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
    this.#raiseForGap(`${worker} misses step ${report.expected}`);
  }

  /** Steps that are overdue are sent again. To be called every now and then. */
  tick(): void {
    if (this.#state !== "open") return;
    if (this.#ledger.expired(this.#options.clock.nowMs())) this.#raise("a step is overdue");
    else if (this.#gap !== null && this.#ledger.size > 0) this.#raiseForGap(this.#gap);
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

  #receive(message: BusMessage): void {
    if (this.#state !== "open") return;
    const frame = this.#judge(message);
    if (!frame) return;
    const nowMs = this.#options.clock.nowMs();
    const verdict = this.#ledger.accept(frame, nowMs);
    switch (verdict.type) {
      case "accepted":
        this.#complete(verdict.step, frame, nowMs);
        break;
      case "gap":
        this.#raiseForGap("a result was lost");
        break;
      case "duplicate":
      case "stale":
      case "early":
        this.#options.rejections.count(verdict.type);
        break;
      default:
        verdict satisfies never;
    }
  }

  /** The result in a message of the last stage; null, and counted, when it is anything else. */
  #judge({ subject, data }: BusMessage): ResultFrame | null {
    const { rejections } = this.#options;
    const [from, epoch] = subject.split(".").slice(-2);
    if (Number(epoch) < this.epoch) rejections.count("old-epoch");
    else if (Number(epoch) !== this.epoch || from !== this.#lastWorker) {
      rejections.warn("wrong-sender", `${subject.slice(0, 100)}: nobody who should send results`);
    } else {
      try {
        const frame = decodeFrame(data);
        if (frame.type === "result") return frame;
        rejections.warn("malformed-frame", `${from} sent a step where a result belongs`);
      } catch (error) {
        if (!(error instanceof FleetError)) throw error;
        rejections.warn("malformed-frame", `${from}: ${error.message}`);
      }
    }
    return null;
  }

  #complete(step: SentStep, frame: ResultFrame, nowMs: number): void {
    const { scheduler, clock, offsetsMs, onEvents, vocabSize } = this.#options;
    let events: SchedulerEvent[];
    try {
      checkTokens(frame, vocabSize);
      events = scheduler.complete(step.step, frame.results);
    } catch (error) {
      if (!(error instanceof FleetError)) throw error;
      // The last stage answered something else than was asked: it cannot be trusted with more.
      return this.#fail(error, this.#lastWorker);
    }
    this.lastStepAtMs = nowMs;
    const decodeOnly = step.batch.decodeRows === step.batch.rowToken.length;
    this.latency.add(frame.traces, offsetsMs(), frame.issuedAtMs, clock.unixMs(), decodeOnly);
    this.pump();
    onEvents(events);
  }

  get #lastWorker(): string {
    return this.#options.workers[this.#options.workers.length - 1];
  }

  /** Raises the attempt, now or as soon as the ledger listens to gaps again. */
  #raiseForGap(why: string): void {
    if (this.#options.clock.nowMs() >= this.#ledger.gapHeardMs) this.#raise(why);
    else this.#gap = why;
  }

  #raise(why: string): void {
    this.#gap = null;
    const reissue: Reissue<SentStep> = this.#ledger.raise(this.#options.clock.nowMs());
    if (reissue.type === "failed") return this.#fail(reissue.error, null);
    this.#options.onNote(
      `${why}: attempt ${reissue.attempt}, ${reissue.steps.length} steps are sent again`,
    );
    for (const { order, step } of reissue.steps) this.#send(order, step);
  }

  #fail(error: FleetError, culprit: string | null): void {
    if (this.#state !== "open") return;
    this.#state = "failed";
    this.#options.onFailed(error, culprit);
  }
}

/** @throws FleetError `bad-frame` when a result names a token that the model does not have */
function checkTokens({ results }: ResultFrame, vocabSize: number): void {
  for (const result of results) {
    if (result.type !== "sample") continue;
    const wrong = [result.token, ...result.alternativeTokens].find((token) => token >= vocabSize);
    if (wrong === undefined) continue;
    const message = `The results of a step name token ${wrong}; the vocabulary has ${vocabSize}`;
    throw new FleetError("bad-frame", message);
  }
}
