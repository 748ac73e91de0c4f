/**
 * A fleet in simulated time: the real scheduler, ledger and stage inbox over links that lose, double
 * and delay, and stages that run the {@linkcode HashStage} model. One seed replays everything.
 *
 * @module
 */
import { Ledger, type Reissue } from "../../coordinator/ledger.ts";
import {
  type ScheduledStep,
  Scheduler,
  type SchedulerConfig,
  type SchedulerEvent,
  type SubmittedSequence,
} from "../../coordinator/scheduler.ts";
import { assertEquals } from "@std/assert";
import { type Timer, VirtualClock } from "../../shared/clock.ts";
import { decodeFrame, encodeFrame } from "../../shared/codec.ts";
import { invariant } from "../../shared/errors.ts";
import type { FrameOrder, RowResult, StepBatch, StepFrame } from "../../shared/frames.ts";
import { type Random, randomInt } from "../../shared/random.ts";
import { judgeFrame, openInbox } from "../../worker/stage_inbox.ts";
import { misfit, type StageBounds } from "../../worker/stage_bounds.ts";
import { HashStage, LAYERS, VOCABULARY } from "./hash_model.ts";

/** What links do to messages; chances in `[0, 1]`. */
export interface Faults {
  lose: number;
  double: number;
  /** Chance of being held up for up to `delayMs`; later messages may overtake. */
  delay: number;
  delayMs: number;
}

export const NO_FAULTS: Faults = { lose: 0, double: 0, delay: 0, delayMs: 0 };

/** A fleet. */
export interface FleetOptions {
  random: Random;
  config: SchedulerConfig;
  faults: Faults;
  hopMs: number;
  /** How long a stage works on a step. */
  stepMs: (batch: StepBatch) => number;
}

/** What became of a sequence. */
export interface Stream {
  tokens: number[];
  end: "stop" | "length" | "error" | null;
  cancelled: boolean;
}

interface Frame {
  order: FrameOrder;
  scheduled: ScheduledStep;
  hidden: Uint32Array | null;
}

/** Encoding every frame would take most of the time. */
const WIRE_EVERY = 4;

/** What the codec and a stage's bounds say of a step: they must let it through unchanged. */
function overTheWire(order: FrameOrder, { batch }: ScheduledStep, config: SchedulerConfig): void {
  const frame: StepFrame = {
    type: "step",
    ...order,
    issuedAtMs: 0,
    batch,
    hidden: null,
    traces: [],
  };
  const decoded = decodeFrame(encodeFrame(frame));
  invariant(decoded.type === "step", "a step is a step");
  assertEquals(decoded.batch, batch);
  const bounds: StageBounds = {
    limits: {
      maxRows: config.maxRows,
      maxSequences: config.maxSequencesPerStep,
      maxOutputs: config.maxOutputs,
      pages: config.pages,
      contextTokens: config.contextTokens,
    },
    config: { hiddenSize: 64, vocabSize: VOCABULARY },
    first: true,
  };
  const reason = misfit(decoded, bounds);
  invariant(!reason, `a stage would drop the step: ${reason}`);
}

/** Layers of each stage, as even as can be. */
function cut(stages: number): { from: number; to: number }[] {
  return Array.from({ length: stages }, (_, i) => ({
    from: Math.floor(i * LAYERS / stages),
    to: Math.floor((i + 1) * LAYERS / stages),
  }));
}

/** The fleet; drive it with {@linkcode run}. */
export class SimulatedFleet {
  readonly clock = new VirtualClock();
  readonly scheduler: Scheduler;
  readonly streams = new Map<string, Stream>();
  /** Per stage of the current epoch: ms spent working. */
  busyMs: number[] = [];
  reissues = 0;
  epochs = 0;
  readonly #options: FleetOptions;
  #config: SchedulerConfig;
  #ledger!: Ledger<ScheduledStep>;
  #stages: SimulatedStage[] = [];
  #deadline: Timer | null = null;
  #sent = 0;
  #results = 0;

  constructor(options: FleetOptions) {
    this.#options = options;
    this.#config = options.config;
    this.scheduler = new Scheduler(options.config);
    this.#openEpoch();
  }

  submit(sequence: SubmittedSequence): void {
    this.scheduler.submit(sequence);
    this.streams.set(sequence.id, { tokens: [], end: null, cancelled: false });
    this.#pump();
  }

  cancel(id: string): void {
    const stream = this.streams.get(id);
    if (!stream || stream.end) return;
    stream.cancelled = true;
    this.scheduler.cancel(id);
    this.#pump();
  }

  /** Every stage is replaced: its KV is gone, frames on their way belong to nobody. */
  replan(config: SchedulerConfig = this.#config): void {
    this.#config = config;
    this.#apply(this.scheduler.requeueAll(config));
    this.#openEpoch();
    this.#pump();
  }

  /** Runs until nothing moves any more, or for `forMs`. */
  run(forMs = Infinity): void {
    const endMs = this.clock.nowMs() + forMs;
    while (this.clock.nowMs() < endMs && this.clock.step());
    this.scheduler.check();
  }

  #openEpoch(): void {
    this.epochs++;
    this.#ledger = new Ledger<ScheduledStep>(this.epochs, { stepDeadlineMs: 200 });
    const ranges = cut(this.#config.stages);
    this.busyMs = ranges.map(() => 0);
    for (const stage of this.#stages) stage.close();
    this.#stages = ranges.map((range, index) =>
      new SimulatedStage(this, this.epochs, index, range)
    );
  }

  #pump(): void {
    for (let step = this.scheduler.nextStep(); step; step = this.scheduler.nextStep()) {
      for (const id of step.sequences) {
        invariant(!this.streams.get(id)!.cancelled, `step ${step.step} names ${id}, cancelled`);
        invariant(!this.streams.get(id)!.end, `step ${step.step} names ${id}, which has ended`);
      }
      this.#send(this.#ledger.issue(step.step, step, this.clock.nowMs()), step);
    }
    this.#watch();
  }

  #send(order: FrameOrder, scheduled: ScheduledStep): void {
    const stage = this.#stages[0];
    if (this.#sent++ % WIRE_EVERY === 0) overTheWire(order, scheduled, this.#config);
    this.deliver(() => stage.receive({ order, scheduled, hidden: null }));
  }

  /** A message over the wire. */
  deliver(receive: () => void): void {
    const { random, faults, hopMs } = this.#options;
    const copies = random() < faults.lose ? 0 : random() < faults.double ? 2 : 1;
    for (let copy = 0; copy < copies; copy++) {
      const heldMs = random() < faults.delay ? random() * faults.delayMs : 0;
      this.clock.after(hopMs + heldMs, receive);
    }
  }

  /** A step came out of stage `index`. */
  passOn(index: number, frame: Frame): void {
    const next = this.#stages[index + 1];
    if (next) return this.deliver(() => next.receive(frame));
    const results = HashStage.answer(frame.scheduled.batch, frame.hidden!);
    this.deliver(() => this.#receiveResult(frame.order, results));
  }

  reportGap(report: { epoch: number; attempt: number }): void {
    this.deliver(() => {
      if (this.#ledger.isCurrent(report)) this.#reissue();
    });
  }

  #receiveResult(order: FrameOrder, results: RowResult[]): void {
    const verdict = this.#ledger.accept(order, this.clock.nowMs());
    if (verdict.type === "gap") return this.#reissue();
    if (verdict.type !== "accepted") return;
    this.#apply(this.scheduler.complete(verdict.step.step, results));
    if (this.#results++ % 8 === 0) this.scheduler.check();
    this.#pump();
  }

  #apply(events: SchedulerEvent[]): void {
    for (const event of events) {
      const stream = this.streams.get(event.id)!;
      invariant(!stream.end && !stream.cancelled, `${event.id} goes on after its end`);
      if (event.type === "token") stream.tokens.push(event.token);
      else stream.end = event.type === "finish" ? event.reason : "error";
    }
  }

  #reissue(): void {
    const reissue: Reissue<ScheduledStep> = this.#ledger.raise(this.clock.nowMs());
    if (reissue.type === "failed") return this.replan();
    this.reissues++;
    for (const { order, step } of reissue.steps) this.#send(order, step);
    this.#watch();
  }

  #watch(): void {
    this.#deadline?.cancel();
    const { deadlineMs } = this.#ledger;
    if (deadlineMs === null) return;
    this.#deadline = this.clock.after(deadlineMs - this.clock.nowMs(), () => {
      if (this.#ledger.expired(this.clock.nowMs())) this.#reissue();
      else this.#watch();
    });
  }

  /** For stages. */
  get options(): FleetOptions & { pages: number } {
    return { ...this.#options, pages: this.#config.pages };
  }
}

class SimulatedStage {
  readonly #fleet: SimulatedFleet;
  readonly #index: number;
  readonly #model: HashStage;
  #inbox;
  #queue: Frame[] = [];
  #working = false;
  #open = true;

  constructor(
    fleet: SimulatedFleet,
    epoch: number,
    index: number,
    range: { from: number; to: number },
  ) {
    const { pages, random } = fleet.options;
    this.#fleet = fleet;
    this.#index = index;
    this.#model = new HashStage({ ...range, pages, garbage: randomInt(random, 2 ** 32) });
    this.#inbox = openInbox(epoch, "previous");
  }

  close(): void {
    this.#open = false;
  }

  receive(frame: Frame): void {
    if (!this.#open) return;
    const { inbox, decision } = judgeFrame(this.#inbox, frame.order, this.#queue.length < 64);
    this.#inbox = inbox;
    if (decision.supersedes) this.#queue = [];
    if (decision.type === "apply") {
      this.#queue.push(frame);
      this.#work();
    } else if (decision.gap) {
      this.#fleet.reportGap({ epoch: inbox.epoch, attempt: decision.gap.attempt });
    }
  }

  #work(): void {
    const frame = this.#queue[0];
    if (this.#working || !frame) return;
    this.#queue.shift();
    this.#working = true;
    const ms = this.#fleet.options.stepMs(frame.scheduled.batch);
    this.#fleet.clock.after(ms, () => {
      if (!this.#open) return;
      this.#fleet.busyMs[this.#index] += ms;
      this.#working = false;
      const hidden = this.#model.run(frame.scheduled.batch, frame.hidden);
      this.#fleet.passOn(this.#index, { ...frame, hidden });
      this.#work();
    });
  }
}
