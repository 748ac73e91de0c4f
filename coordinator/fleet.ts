/**
 * The fleet's loop: workers come and go, plans are made and put in place, sequences run. It owns the
 * sockets and the clock; what it decides, it decides with the pure parts (membership, planner,
 * scheduler, ledger).
 *
 * @module
 */
import { sleep, type Timer } from "../shared/clock.ts";
import { FleetError, toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import type { PartName } from "../shared/model_config.ts";
import { type Subjects, subjects } from "../shared/protocol.ts";
import { Assignment, type AssignmentOutcome, assignRequests } from "./assignment.ts";
import { sendCanary } from "./canary.ts";
import type { Engine, GenerateRequest, Readiness } from "./engine.ts";
import type { EventStream } from "./event_stream.ts";
import { FleetLog, Rejections } from "./fleet_log.ts";
import type { FleetOptions } from "./fleet_options.ts";
import { fleetSnapshot } from "./fleet_snapshot.ts";
import type { MembershipEvent } from "./membership.ts";
import { Pipeline } from "./pipeline.ts";
import { type Plan, planStages } from "./planner.ts";
import { Roster, type StageReport } from "./roster.ts";
import { Scheduler, type SchedulerEvent } from "./scheduler.ts";
import { schedulerConfig } from "./scheduler_config.ts";
import type { FleetSnapshot } from "./snapshot.ts";
import { Streams } from "./streams.ts";

export type { FleetModel, FleetOptions } from "./fleet_options.ts";

/** What the workers should still hear at the end. */
const FLUSH_WITHIN_MS = 1_000;
const TICK_EVERY_MS = 50;
/** Listeners of {@linkcode Engine.onChange} are called at most this often. */
const NOTIFY_EVERY_MS = 250;
/** Workers that start together should be planned together. */
const SETTLE_MS = 1_000;
/** Sequences wait this long for a pipeline to come back. */
const RECOVER_WITHIN_MS = 60_000;

/** The coordinator's fleet, as an engine. */
export class Fleet implements Engine {
  readonly model: Engine["model"];
  readonly #options: FleetOptions;
  readonly #subjects: Subjects;
  readonly #roster: Roster;
  readonly #streams: Streams;
  readonly #log: FleetLog;
  readonly #rejections: Rejections;
  readonly #listeners = new Set<() => void>();
  #timer: Timer | null = null;
  #scheduler: Scheduler | null = null;
  #pipeline: Pipeline | null = null;
  #assignment: Assignment | null = null;
  #plan: { epoch: number; plan: Plan } | null = null;
  #planning = false;
  #replanAtMs: number | null = null;
  #note = "no worker has joined yet";
  #withoutPipelineSinceMs: number | null = null;
  #lastNotifyMs = -Infinity;
  #lastStepAtMs: number | null = null;
  #reissuesBefore = 0;
  #preemptionsBefore = 0;
  #changed = true;
  #canary: Promise<Readiness> | null = null;
  #stopped = false;

  constructor(options: FleetOptions) {
    const { config, id, createdUnix } = options.model;
    this.#options = options;
    this.#subjects = subjects(options.prefix);
    this.#log = new FleetLog(options.clock, options.log);
    this.#rejections = new Rejections(this.#log);
    this.#streams = new Streams(options.clock);
    this.#roster = new Roster({
      bus: options.bus,
      clock: options.clock,
      subjects: this.#subjects,
      onMembership: (event) => this.#onMembership(event),
      onReport: (worker, report) => this.#onReport(worker, report),
      onRestored: () => this.#considerNewcomers(),
      onReconnected: () => this.#pipeline?.reconnected(),
      log: this.#log,
      rejections: this.#rejections,
    });
    this.model = {
      id,
      createdUnix,
      contextTokens: options.contextTokens,
      vocabSize: config.vocabSize,
      eosTokens: config.eosTokens,
      bosToken: config.bosToken,
    };
  }

  /** Listens to the workers and starts the clockwork. */
  start(): void {
    this.#roster.start();
    this.#tick();
  }

  /**
   * Ends every sequence with a clear error and lets the workers go; they keep their weights. Takes a
   * bounded time, whether the bus is there or not.
   */
  async stop(): Promise<void> {
    const { bus, clock } = this.#options;
    this.#stopped = true;
    this.#timer?.cancel();
    this.#timer = null;
    const { plan } = this.#plan ?? {};
    this.#dropPlan();
    this.#note = "the coordinator is shutting down";
    this.#abortAll("The coordinator is shutting down");
    for (const stage of plan?.stages ?? []) this.#roster.release(stage.worker);
    this.#roster.stop();
    if (bus.status !== "connected") return;
    const enough = new AbortController();
    await Promise.race([bus.flush(), sleep(clock, FLUSH_WITHIN_MS, enough.signal)]).catch(() => {});
    enough.abort();
  }

  generate(request: GenerateRequest, signal: AbortSignal): EventStream {
    const scheduler = this.#scheduler;
    if (!scheduler) {
      throw new FleetError("unavailable", `The fleet serves nothing yet: ${this.#note}`);
    }
    const stream = this.#streams.open(scheduler, request, signal, () => this.#pipeline?.pump());
    this.#pipeline?.pump();
    return stream;
  }

  async readiness(): Promise<Readiness> {
    if (!this.#pipeline) return { ready: false, reason: this.#note };
    const nowMs = this.#options.clock.nowMs();
    const lastStepAtMs = this.#pipeline.lastStepAtMs;
    if (lastStepAtMs !== null && nowMs - lastStepAtMs < LIMITS.readyWithinMs) {
      const agoMs = Math.round(nowMs - lastStepAtMs);
      return { ready: true, reason: `a step completed ${agoMs} ms ago` };
    }
    if (this.#pipeline.stepsInFlight > 0) {
      return { ready: false, reason: `no step completed in the last ${LIMITS.readyWithinMs} ms` };
    }
    const { clock, model } = this.#options;
    this.#canary ??= sendCanary(this, clock, model.config).finally(() => this.#canary = null);
    return await this.#canary;
  }

  onChange(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  snapshot(): FleetSnapshot {
    const { clock, model, profile } = this.#options;
    const nowMs = clock.nowMs();
    return fleetSnapshot({
      nowMs,
      nowUnixMs: clock.unixMs(),
      model,
      profile,
      state: this.#state(),
      note: this.#note,
      roster: this.#roster,
      plan: this.#plan,
      pipeline: this.#pipeline,
      progress: this.#assignment?.progress ?? new Map(),
      load: {
        stats: this.#scheduler?.stats ?? null,
        preemptionsBefore: this.#preemptionsBefore,
        reissuesBefore: this.#reissuesBefore,
        tokensPerSecond: this.#streams.rate.perSecond(nowMs),
        tokensTotal: this.#streams.rate.total,
        sequencesTotal: this.#streams.admitted,
      },
      dropped: this.#rejections.counts,
      events: this.#log.events,
    });
  }

  /** The bus says that a connection of this name has ended, sooner than beats could tell. */
  async disconnected(worker: string): Promise<void> {
    await this.#roster.disconnected(worker);
  }

  // ── Workers ─────────────────────────────────────────────────────────────────────────────────

  #onMembership(event: MembershipEvent): void {
    const { worker } = event;
    this.#changed = true;
    switch (event.type) {
      case "joined":
        this.#log.add("workers", "info", `${worker} joined`);
        this.#considerNewcomers();
        break;
      case "lost":
        this.#log.add("workers", "warning", `${worker} is lost: ${event.reason}`);
        if (!this.#serves(event)) break;
        this.#roster.strike(worker);
        this.#replanNow();
        break;
      case "leaving":
        this.#log.add("workers", "warning", `${worker} is leaving`);
        if (this.#serves(event)) this.#replanNow();
        break;
      case "refused":
        this.#log.add("workers", "warning", `${worker} is refused: ${event.reason}`);
        break;
      case "namesake": {
        const text = `a second process calls itself ${worker} and is turned away: give it a --name`;
        this.#log.add("workers", "warning", text);
        break;
      }
      case "changed":
        this.#heedBeat(event);
        break;
      default:
        event satisfies never;
    }
  }

  /** Beats say again what may have been lost with a report. */
  #heedBeat(event: { worker: string; instance: string }): void {
    const { worker, instance } = event;
    const beat = this.#roster.beat(worker);
    if (!this.#plan || !beat) return;
    // What it serves or loads was asked of it by an earlier plan, perhaps one that was called off.
    if (!this.#serves(event)) return this.#roster.release(worker);
    const { epoch } = this.#plan;
    if (beat.epoch !== epoch) return;
    if (beat.state === "serving") {
      this.#assignment?.report(worker, { type: "ready", instance, epoch, loadMs: 0 });
    } else if (beat.state === "failed") {
      const message = "it says that it failed, and its reason was lost on the way";
      this.#onReport(worker, { type: "failed", instance, epoch, code: "unavailable", message });
    }
  }

  #onReport(worker: string, report: StageReport): void {
    this.#changed = true;
    this.#assignment?.report(worker, report);
    if (report.type !== "gap" && report.type !== "failed") return;
    const { instance } = report;
    if (!this.#serves({ worker, instance }) || report.epoch !== this.#plan?.epoch) {
      this.#rejections.count("stray-report");
    } else if (!this.#pipeline) return;
    else if (report.type === "gap") this.#pipeline.gap(worker, report);
    else this.#workerFailed(worker, instance, report.message);
  }

  /** Whether the current plan gives this very process a stage. */
  #serves({ worker, instance }: { worker: string; instance: string }): boolean {
    const stages = this.#plan?.plan.stages ?? [];
    return stages.some((stage) => stage.worker === worker && stage.instance === instance);
  }

  #workerFailed(worker: string, instance: string, reason: string): void {
    this.#leaveOut(worker, instance, reason);
    this.#replanNow();
  }

  #leaveOut(worker: string, instance: string, reason: string): void {
    const seconds = Math.round(this.#roster.exclude(worker, instance, reason) / 1000);
    this.#log.add("workers", "error", `${worker} is left out for ${seconds} s: ${reason}`);
  }

  // ── Plans ───────────────────────────────────────────────────────────────────────────────────

  /**
   * Newcomers get a stage when there is no plan, or one of fewer stages than asked for; those that
   * come and go all the time only when there is none.
   */
  #considerNewcomers(): void {
    const placed = this.#plan?.plan.stages;
    if (!placed) return this.#replanSoon(SETTLE_MS);
    if (placed.length >= (this.#options.stages ?? 0)) return;
    const names = new Set(placed.map(({ worker }) => worker));
    const fresh = this.#roster.usable.map(({ card }) => card.worker)
      .filter((worker) => !names.has(worker) && this.#roster.isSteady(worker));
    if (fresh.length > 0) this.#replanSoon(SETTLE_MS);
  }

  #replanSoon(delayMs: number): void {
    const atMs = this.#options.clock.nowMs() + delayMs;
    this.#replanAtMs = Math.max(atMs, this.#replanAtMs ?? 0);
  }

  /** What is lost now stops now: no more steps go to a pipeline that cannot finish them. */
  #replanNow(): void {
    this.#dropPlan();
    this.#replanAtMs = this.#options.clock.nowMs();
    this.#replanIfDue();
  }

  #replanIfDue(): void {
    if (this.#planning || this.#replanAtMs === null) return;
    if (this.#options.clock.nowMs() < this.#replanAtMs) return;
    this.#replanAtMs = null;
    this.#dropPlan();
    this.#planning = true;
    this.#replan()
      .catch((error) => {
        const { message } = toFleetError(error);
        if (message !== this.#note) this.#log.add("plans", "error", message);
        this.#note = message;
        this.#replanSoon(SETTLE_MS);
      })
      .finally(() => {
        this.#planning = false;
        this.#changed = true;
      });
  }

  async #replan(): Promise<void> {
    const { model, contextTokens, sequences, objective } = this.#options;
    const members = this.#roster.usable;
    const wanted = this.#options.stages;
    if (members.length === 0) {
      this.#note = this.#whyNobodyIsThere();
      return;
    }
    const joined = members.length + this.#roster.excluded.length;
    if (wanted !== null && joined < wanted && !this.#scheduler) {
      this.#note = `${joined} of ${wanted} workers have joined`;
      return;
    }
    const stages = wanted === null ? undefined : Math.min(wanted, members.length);
    const plan = planStages({
      config: model.config,
      partBytes: new Map(model.parts.map(({ part, bytes }) => [part as PartName, bytes])),
      workers: members.map(({ card }) => ({
        card,
        roundTripMs: this.#roster.roundTripMs(card.worker) ?? 0,
      })),
      wish: { contextTokens, maxSequences: sequences },
      objective: wanted === null ? objective : "spread",
      stages,
      maxFrameBytes: Math.min(LIMITS.maxFrameBytes, this.#options.bus.maxPayloadBytes),
    });
    const epoch = await this.#options.nextEpoch();
    if (this.#stopped) return;
    // While the epoch was made durable somebody may have gone.
    const allThere = plan.stages.every(({ worker, instance }) =>
      this.#roster.isPresent(worker, instance)
    );
    if (allThere) this.#assign(epoch, plan);
    else this.#replanSoon(0);
  }

  #whyNobodyIsThere(): string {
    const { excluded } = this.#roster;
    if (excluded.length === 0) return "no worker is there";
    const reasons = excluded.slice(0, 3)
      .map((member) => `${member.card.worker}: ${this.#roster.exclusion(member)}`);
    return `every worker has failed (${reasons.join("; ")})`.slice(0, 1_000);
  }

  #assign(epoch: number, plan: Plan): void {
    const { bus, clock, model, profile } = this.#options;
    this.#plan = { epoch, plan };
    this.#note = `${stagesOf(plan)} getting ready`;
    this.#log.add("plans", "info", `epoch ${epoch}: ${plan.explanation.join("; ")}`);
    const placed = new Set(plan.stages.map(({ worker }) => worker));
    for (const { card } of this.#roster.members) {
      if (!placed.has(card.worker)) this.#roster.release(card.worker);
    }
    this.#assignment = new Assignment({
      bus,
      clock,
      subjects: this.#subjects,
      epoch,
      stages: assignRequests(epoch, plan, model, profile),
      onOutcome: (outcome) => this.#assigned(outcome),
    });
    this.#changed = true;
  }

  #assigned(outcome: AssignmentOutcome): void {
    this.#changed = true;
    this.#assignment = null;
    const { epoch, plan } = this.#plan!;
    if (outcome.type === "failed") {
      const { worker, instance } = plan.stages.find(({ worker }) => worker === outcome.worker)!;
      return this.#workerFailed(worker, instance, outcome.error.message);
    }
    const { bus, model } = this.#options;
    const config = schedulerConfig(plan, model.config.hiddenSize, bus.maxPayloadBytes);
    if (this.#scheduler) this.#handle(this.#scheduler.requeueAll(config));
    else this.#scheduler = new Scheduler(config);
    const { waiting } = this.#scheduler.stats;
    if (waiting === 0) this.#withoutPipelineSinceMs = null;
    const workers = plan.stages.map(({ worker }) => worker);
    this.#pipeline = new Pipeline({
      bus: this.#options.bus,
      clock: this.#options.clock,
      subjects: this.#subjects,
      epoch,
      workers,
      scheduler: this.#scheduler,
      vocabSize: model.config.vocabSize,
      offsetsMs: () => workers.map((worker) => this.#roster.clockOffsetMs(worker)),
      onEvents: (events) => this.#handle(events),
      onNote: (text) => this.#log.add("steps", "warning", text),
      onFailed: (error, culprit) => this.#pipelineFailed(error, culprit),
      rejections: this.#rejections,
    });
    this.#note = `${stagesOf(plan)} serving`;
    this.#log.add("plans", "info", `epoch ${epoch} serves`);
    this.#pipeline.pump();
  }

  /**
   * Who is to blame is left out for a while. Where nobody knows, the same workers get a second chance;
   * if no step comes through then either, all of them are left out.
   */
  #pipelineFailed(error: FleetError, culprit: string | null): void {
    this.#log.add("plans", "error", error.message);
    const { stages } = this.#plan!.plan;
    const proven = this.#pipeline!.lastStepAtMs !== null;
    for (const { worker, instance } of stages) {
      if (culprit === null ? !proven : worker === culprit) {
        this.#leaveOut(worker, instance, error.message);
      }
    }
    this.#replanNow();
  }

  #dropPlan(): void {
    this.#assignment?.cancel();
    this.#assignment = null;
    if (this.#pipeline) {
      this.#reissuesBefore += this.#pipeline.reissues;
      this.#pipeline.close();
      this.#pipeline = null;
      this.#note = "a new plan is being made";
    }
    this.#plan = null;
    this.#withoutPipelineSinceMs ??= this.#options.clock.nowMs();
  }

  // ── Sequences ───────────────────────────────────────────────────────────────────────────────

  #handle(events: readonly SchedulerEvent[]): void {
    this.#changed ||= events.length > 0;
    this.#streams.deliver(events);
  }

  // ── The clockwork ───────────────────────────────────────────────────────────────────────────

  #tick(): void {
    const { clock } = this.#options;
    const nowMs = clock.nowMs();
    this.#timer = clock.after(TICK_EVERY_MS, () => this.#tick());
    this.#log.tick();
    this.#roster.tick();
    this.#pipeline?.tick();
    this.#giveUpIfDue(nowMs);
    this.#replanIfDue();
    if (this.#pipeline && this.#pipeline.lastStepAtMs !== this.#lastStepAtMs) {
      this.#lastStepAtMs = this.#pipeline.lastStepAtMs;
      this.#changed = true;
    }
    if (this.#changed && nowMs - this.#lastNotifyMs >= NOTIFY_EVERY_MS) {
      this.#changed = false;
      this.#lastNotifyMs = nowMs;
      for (const listener of this.#listeners) listener();
    }
  }

  /** Sequences do not wait for ever for a pipeline that does not come back, or brings nothing. */
  #giveUpIfDue(nowMs: number): void {
    const pipeline = this.#pipeline;
    if (pipeline && (pipeline.lastStepAtMs !== null || pipeline.stepsInFlight === 0)) {
      this.#withoutPipelineSinceMs = null;
    }
    const sinceMs = this.#withoutPipelineSinceMs;
    if (sinceMs === null || nowMs - sinceMs < RECOVER_WITHIN_MS) return;
    // While a new plan loads, or its first steps are on their way, their own bounds apply.
    if (this.#planning || this.#assignment || pipeline) return;
    this.#abortAll(`The fleet lost its pipeline and could not make another: ${this.#note}`);
  }

  /** Ends every sequence; new ones are refused until there is a pipeline again. */
  #abortAll(message: string): void {
    if (!this.#scheduler) return;
    this.#preemptionsBefore += this.#scheduler.stats.preemptions;
    this.#handle(this.#scheduler.abortAll(new FleetError("unavailable", message)));
    this.#scheduler = null;
  }

  #state(): FleetSnapshot["state"] {
    if (this.#pipeline) return "serving";
    if (this.#assignment) return "loading";
    return this.#roster.excluded.length > 0 ? "failed" : "waiting";
  }
}

function stagesOf({ stages }: Plan): string {
  return stages.length === 1 ? "one stage is" : `${stages.length} stages are`;
}
