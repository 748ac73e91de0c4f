/**
 * The fleet's loop: workers come and go, plans are made and put in place, sequences run. It owns the
 * sockets and the clock; what it decides, it decides with the pure parts (membership, planner,
 * scheduler, ledger).
 *
 * @module
 */
import type { Bus, BusMessage, Subscription } from "../shared/bus.ts";
import type { Clock, Timer } from "../shared/clock.ts";
import { stepFrameBytes } from "../shared/codec.ts";
import { FleetError, toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig, PartName } from "../shared/model_config.ts";
import {
  type AssignStage,
  Beat,
  ControlReply,
  type ControlRequest,
  COORDINATOR,
  decodeControl,
  encodeControl,
  type NumericsProfile,
  type PartRef,
  PROTOCOL_VERSION,
  type Subjects,
  subjects,
  WorkerCard,
  WorkerReport,
} from "../shared/protocol.ts";
import { Assignment, type AssignmentOutcome } from "./assignment.ts";
import type { Engine, GenerateRequest, Readiness } from "./engine.ts";
import { EventStream } from "./event_stream.ts";
import { FleetLog, TokenRate } from "./fleet_log.ts";
import { fleetSnapshot } from "./fleet_snapshot.ts";
import { ClockOffset } from "./latency.ts";
import { type Member, Membership, type MembershipEvent } from "./membership.ts";
import { Pipeline } from "./pipeline.ts";
import { type Plan, planStages } from "./planner.ts";
import { Scheduler, type SchedulerConfig, type SchedulerEvent } from "./scheduler.ts";
import type { FleetEvent, FleetSnapshot } from "./snapshot.ts";

/** The model that a fleet serves. */
export interface FleetModel {
  id: string;
  createdUnix: number;
  /** "m1v4g128" or "float16". */
  format: string;
  config: ModelConfig;
  configJson: string;
  digest: string;
  parts: readonly PartRef[];
}

/** What a fleet is made of. */
export interface FleetOptions {
  bus: Bus;
  clock: Clock;
  prefix: string;
  model: FleetModel;
  /** A number that was never used before in this fleet, made durable first. */
  nextEpoch: () => Promise<number>;
  /** Longest sequence, tokens. */
  contextTokens: number;
  /** Sequences that should find pages at once; the planner gives what fits. */
  sequences: number;
  objective: "throughput" | "latency";
  /** Wait for this many workers, and use as many stages; null plans with who is there. */
  stages: number | null;
  profile: NumericsProfile;
  log: (event: FleetEvent) => void;
}

const TICK_EVERY_MS = 50;
const PING_EVERY_MS = 1_000;
const PING_TIMEOUT_MS = 900;
/** Listeners of {@linkcode Engine.onChange} are called at most this often. */
const NOTIFY_EVERY_MS = 250;
/** Workers that start together should be planned together. */
const SETTLE_MS = 1_000;
const ROLL_CALL_EVERY_MS = 1_000;
/** A worker that failed to load is tried again after this. */
const EXCLUDED_FOR_MS = 30_000;
/** Sequences wait this long for a pipeline to come back. */
const RECOVER_WITHIN_MS = 60_000;
/** Prefill rows of a step: small beside what decoding sequences wait for, large enough to be efficient. */
const PREFILL_ROWS = 128;

/** The coordinator's fleet, as an engine. */
export class Fleet implements Engine {
  readonly model: Engine["model"];
  readonly #options: FleetOptions;
  readonly #subjects: Subjects;
  readonly #membership = new Membership();
  readonly #offsets = new Map<string, ClockOffset>();
  /** Instances that failed to serve, with when they may be tried again and why they failed. */
  readonly #excluded = new Map<string, { untilMs: number; reason: string }>();
  readonly #streams = new Map<string, EventStream>();
  readonly #log: FleetLog;
  readonly #rate = new TokenRate();
  readonly #listeners = new Set<() => void>();
  #subscriptions: Subscription[] = [];
  #timer: Timer | null = null;
  #scheduler: Scheduler | null = null;
  #pipeline: Pipeline | null = null;
  #assignment: Assignment | null = null;
  #plan: { epoch: number; plan: Plan } | null = null;
  #planning = false;
  #replanAtMs: number | null = null;
  #note = "no worker has joined yet";
  #withoutPipelineSinceMs: number | null = null;
  #lastPingMs = -Infinity;
  #lastNotifyMs = -Infinity;
  #lastRollCallMs = -Infinity;
  #lastStepAtMs: number | null = null;
  #nextId = 1;
  #sequencesTotal = 0;
  #reissuesBefore = 0;
  #preemptionsBefore = 0;
  #changed = true;
  #canary: Promise<Readiness> | null = null;

  constructor(options: FleetOptions) {
    const { config, id, createdUnix } = options.model;
    this.#options = options;
    this.#subjects = subjects(options.prefix);
    this.#log = new FleetLog(options.clock, options.log);
    this.model = {
      id,
      createdUnix,
      contextTokens: options.contextTokens,
      vocabSize: config.vocabSize,
      eosTokens: config.eosTokens,
      bosToken: config.bosToken,
    };
  }

  /** Listens, calls the roll, and starts the clockwork. */
  start(): void {
    const { bus, prefix } = this.#options;
    const names = subjects(prefix);
    this.#subscriptions = [
      bus.subscribe(names.hello("*"), (message) => this.#hello(message)),
      bus.subscribe(names.beat("*"), (message) => this.#beat(message)),
      bus.subscribe(names.report("*"), (message) => this.#report(message)),
      bus.onStatus((status) => {
        this.#log.add(status === "connected" ? "info" : "warning", `the bus is ${status}`);
        if (status !== "connected") return;
        this.#rollCall();
        this.#pipeline?.reconnected();
      }),
    ];
    this.#rollCall();
    this.#tick();
  }

  /** Ends every sequence with a clear error and lets the workers go; they keep their weights. */
  async stop(): Promise<void> {
    this.#timer?.cancel();
    this.#timer = null;
    const error = new FleetError("unavailable", "The coordinator is shutting down");
    this.#handle(this.#scheduler?.abortAll(error) ?? []);
    const { plan } = this.#plan ?? {};
    this.#dropPlan();
    for (const stage of plan?.stages ?? []) this.#release(stage.worker);
    for (const subscription of this.#subscriptions) subscription.unsubscribe();
    await this.#options.bus.flush();
  }

  generate(request: GenerateRequest, signal: AbortSignal): EventStream {
    const scheduler = this.#scheduler;
    if (!scheduler) {
      throw new FleetError("unavailable", `The fleet serves nothing yet: ${this.#note}`);
    }
    const id = `s${this.#nextId++}`;
    scheduler.submit({ ...request, id });
    this.#sequencesTotal++;
    const stream = new EventStream(() => {
      this.#streams.delete(id);
      scheduler.cancel(id);
      this.#pipeline?.pump();
    });
    this.#streams.set(id, stream);
    if (signal.aborted) stream.close();
    else signal.addEventListener("abort", () => stream.close(), { once: true });
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
    this.#canary ??= this.#sendCanary().finally(() => this.#canary = null);
    return await this.#canary;
  }

  onChange(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  snapshot(): FleetSnapshot {
    const { clock, model } = this.#options;
    const nowMs = clock.nowMs();
    return fleetSnapshot({
      nowMs,
      nowUnixMs: clock.unixMs(),
      model,
      state: this.#state(),
      note: this.#note,
      members: this.#membership.members,
      exclusion: (member) => this.#excluded.get(member.card.instance)?.reason ?? null,
      roundTripMs: (worker) => this.#offsets.get(worker)?.roundTripMs ?? null,
      plan: this.#plan,
      pipeline: this.#pipeline,
      progress: this.#assignment?.progress ?? new Map(),
      load: {
        stats: this.#scheduler?.stats ?? null,
        preemptionsBefore: this.#preemptionsBefore,
        reissuesBefore: this.#reissuesBefore,
        tokensPerSecond: this.#rate.perSecond(nowMs),
        tokensTotal: this.#rate.total,
        sequencesTotal: this.#sequencesTotal,
      },
      events: this.#log.events,
    });
  }

  // ── Workers ─────────────────────────────────────────────────────────────────────────────────

  #hello(message: BusMessage): void {
    const card = this.#parse(WorkerCard, message);
    if (!card || !this.#isFrom(card.worker, message)) return;
    this.#onMembership(this.#membership.hello(card, this.#options.clock.nowMs()));
  }

  #beat(message: BusMessage): void {
    const beat = this.#parse(Beat, message);
    if (!beat || !this.#isFrom(beat.worker, message)) return;
    const events = this.#membership.beat(beat, this.#options.clock.nowMs());
    if (events === null) this.#rollCall();
    else this.#onMembership(events);
  }

  #report(message: BusMessage): void {
    const report = this.#parse(WorkerReport, message);
    const worker = message.subject.split(".").at(-1)!;
    if (!report || !this.#membership.isPresent(worker, report.instance)) return;
    this.#changed = true;
    if (report.type === "leaving") {
      return this.#onMembership(this.#membership.leaving(worker, report.instance));
    }
    this.#assignment?.report(worker, report);
    if (!this.#pipeline || report.epoch !== this.#pipeline.epoch) return;
    if (report.type === "gap") this.#pipeline.gap(worker, report);
    if (report.type === "failed") this.#workerFailed(worker, report.message);
  }

  #onMembership(events: readonly MembershipEvent[]): void {
    for (const event of events) {
      this.#changed = true;
      switch (event.type) {
        case "joined":
          this.#log.add("info", `${event.worker} joined`);
          if (!this.#plan) this.#replanSoon(SETTLE_MS);
          break;
        case "lost":
        case "leaving": {
          const what = event.type === "lost" ? `is lost: ${event.reason}` : "is leaving";
          this.#log.add("warning", `${event.worker} ${what}`);
          if (event.type === "lost") this.#offsets.delete(event.worker);
          if (this.#serves(event)) this.#replanSoon(0);
          break;
        }
        case "refused":
          this.#log.add("warning", `${event.worker} is refused: ${event.reason}`);
          break;
        case "changed":
          break;
        default:
          event satisfies never;
      }
    }
  }

  /** Whether the current plan gives this very process a stage. */
  #serves({ worker, instance }: { worker: string; instance: string }): boolean {
    const stages = this.#plan?.plan.stages ?? [];
    return stages.some((stage) => stage.worker === worker && stage.instance === instance);
  }

  #workerFailed(worker: string, reason: string): void {
    const member = this.#membership.get(worker);
    if (member) this.#exclude(member, reason);
    this.#replanSoon(0);
  }

  #exclude(member: Member, reason: string): void {
    const { worker, instance } = member.card;
    this.#log.add("error", `${worker} is left out for a while: ${reason}`);
    const untilMs = this.#options.clock.nowMs() + EXCLUDED_FOR_MS;
    this.#excluded.set(instance, { untilMs, reason });
  }

  #rollCall(): void {
    const nowMs = this.#options.clock.nowMs();
    if (nowMs - this.#lastRollCallMs < ROLL_CALL_EVERY_MS) return;
    this.#lastRollCallMs = nowMs;
    this.#options.bus.publish(this.#subjects.call, encodeControl({}));
  }

  // ── Plans ───────────────────────────────────────────────────────────────────────────────────

  #replanSoon(delayMs: number): void {
    const atMs = this.#options.clock.nowMs() + delayMs;
    // What is lost now stops now: no more steps go to a pipeline that cannot finish them.
    if (delayMs === 0) this.#dropPlan();
    this.#replanAtMs = Math.max(atMs, delayMs === 0 ? 0 : this.#replanAtMs ?? 0);
    if (delayMs === 0) this.#replanIfDue();
  }

  #replanIfDue(): void {
    if (this.#planning || this.#replanAtMs === null) return;
    if (this.#options.clock.nowMs() < this.#replanAtMs) return;
    this.#replanAtMs = null;
    this.#planning = true;
    this.#replan()
      .catch((error) => {
        this.#note = toFleetError(error).message;
        this.#log.add("error", `no plan could be made: ${this.#note}`);
        this.#replanSoon(SETTLE_MS);
      })
      .finally(() => {
        this.#planning = false;
        this.#changed = true;
      });
  }

  async #replan(): Promise<void> {
    const { model, contextTokens, sequences, objective } = this.#options;
    const members = this.#membership.usable.filter(({ card }) =>
      !this.#excluded.has(card.instance)
    );
    const wanted = this.#options.stages;
    if (members.length === 0 || (wanted && members.length < wanted && !this.#scheduler)) {
      this.#note = members.length === 0
        ? "no worker is there"
        : `${members.length} of ${wanted} workers have joined`;
      return;
    }
    const stages = wanted === null ? undefined : Math.min(wanted, members.length);
    const plan = planStages({
      config: model.config,
      partBytes: new Map(model.parts.map(({ part, bytes }) => [part as PartName, bytes])),
      workers: members.map(({ card }) => ({
        card,
        roundTripMs: this.#offsets.get(card.worker)?.roundTripMs ?? 0,
      })),
      wish: { contextTokens, maxSequences: sequences },
      objective: wanted === null ? objective : "spread",
      stages,
      maxFrameBytes: Math.min(LIMITS.maxFrameBytes, this.#options.bus.maxPayloadBytes),
    });
    const epoch = await this.#options.nextEpoch();
    // While the epoch was made durable somebody may have gone.
    const allThere = plan.stages.every(({ worker, instance }) =>
      this.#membership.isPresent(worker, instance)
    );
    if (allThere) this.#assign(epoch, plan);
    else this.#replanSoon(0);
  }

  #assign(epoch: number, plan: Plan): void {
    const { bus, clock, model } = this.#options;
    this.#plan = { epoch, plan };
    this.#note = `${plan.stages.length} stages load their layers`;
    this.#log.add("info", `epoch ${epoch}: ${plan.explanation.join("; ")}`);
    const requests = plan.stages.map((stage, index): AssignStage => ({
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
      parts: model.parts.filter(({ part }) => isPartOf(part, stage)),
      limits: plan.limits,
      profile: this.#options.profile,
    }));
    this.#assignment = new Assignment({
      bus,
      clock,
      subjects: this.#subjects,
      epoch,
      stages: requests.map((request, index) => ({ worker: plan.stages[index].worker, request })),
      onOutcome: (outcome) => this.#assigned(outcome),
    });
    this.#changed = true;
  }

  #assigned(outcome: AssignmentOutcome): void {
    this.#changed = true;
    this.#assignment = null;
    if (outcome.type === "failed") {
      return this.#workerFailed(outcome.worker, outcome.error.message);
    }
    const { epoch, plan } = this.#plan!;
    const config = this.#schedulerConfig(plan);
    if (this.#scheduler) this.#handle(this.#scheduler.requeueAll(config));
    else this.#scheduler = new Scheduler(config);
    const workers = plan.stages.map(({ worker }) => worker);
    this.#pipeline = new Pipeline({
      bus: this.#options.bus,
      clock: this.#options.clock,
      subjects: this.#subjects,
      epoch,
      workers,
      scheduler: this.#scheduler,
      offsetsMs: () => workers.map((worker) => this.#offsets.get(worker)?.offsetMs ?? 0),
      onEvents: (events) => this.#handle(events),
      onNote: (text) => this.#log.add("warning", text),
      onFailed: (error) => this.#pipelineFailed(error),
    });
    this.#withoutPipelineSinceMs = null;
    this.#note = `${plan.stages.length} stages serve`;
    this.#log.add("info", `epoch ${epoch} serves`);
    this.#pipeline.pump();
  }

  #pipelineFailed(error: FleetError): void {
    this.#log.add("error", error.message);
    this.#replanSoon(0);
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

  /** A worker without a stage stops listening for steps; one that does not answer is lost anyway. */
  #release(worker: string): void {
    const instance = this.#membership.get(worker)?.card.instance;
    const epoch = this.#membership.get(worker)?.beat?.epoch;
    if (!instance || !epoch) return;
    const request: ControlRequest = { type: "release", instance, epoch };
    this.#options.bus.request(
      this.#subjects.ctl(worker),
      encodeControl(request),
      LIMITS.controlTimeoutMs,
    ).catch(() => {});
  }

  #schedulerConfig(plan: Plan): SchedulerConfig {
    const { hiddenSize } = this.#options.model.config;
    const stages = plan.stages.length, { limits } = plan;
    return {
      stages,
      maxStepsInFlight: stages * LIMITS.maxStepsInFlightPerStage,
      maxRows: limits.maxRows,
      maxSequencesPerStep: limits.maxSequences,
      maxOutputs: limits.maxOutputs,
      prefillRowsPerStep: Math.min(PREFILL_ROWS, limits.maxRows),
      pages: limits.pages,
      contextTokens: limits.contextTokens,
      maxQueuedSequences: LIMITS.maxQueuedSequences,
      maxFrameBytes: Math.min(LIMITS.maxFrameBytes, this.#options.bus.maxPayloadBytes),
      frameBytes: (shape) => stepFrameBytes({ ...shape, hiddenSize, stages }),
    };
  }

  // ── Sequences ───────────────────────────────────────────────────────────────────────────────

  #handle(events: readonly SchedulerEvent[]): void {
    this.#changed ||= events.length > 0;
    let tokens = 0;
    for (const { id, ...event } of events) {
      const stream = this.#streams.get(id);
      if (event.type === "token") tokens++;
      else this.#streams.delete(id);
      if (event.type === "error") stream?.fail(event.error);
      else stream?.push(event);
    }
    if (tokens > 0) this.#rate.add(tokens, this.#options.clock.nowMs());
  }

  async #sendCanary(): Promise<Readiness> {
    const { clock, model } = this.#options;
    const over = new AbortController();
    const timer = clock.after(LIMITS.readyWithinMs, () => over.abort());
    const startMs = clock.nowMs();
    try {
      const stream = this.generate(canary(model.config), over.signal);
      for await (const event of stream) {
        if (event.type !== "finish") continue;
        const tookMs = Math.round(clock.nowMs() - startMs);
        return { ready: true, reason: `a canary token took ${tookMs} ms` };
      }
      return { ready: false, reason: `a canary token took over ${LIMITS.readyWithinMs} ms` };
    } catch (error) {
      return { ready: false, reason: toFleetError(error).message };
    } finally {
      timer.cancel();
    }
  }

  // ── The clockwork ───────────────────────────────────────────────────────────────────────────

  #tick(): void {
    const { clock } = this.#options;
    const nowMs = clock.nowMs();
    this.#onMembership(this.#membership.tick(nowMs));
    this.#pipeline?.tick();
    for (const [instance, { untilMs }] of this.#excluded) {
      if (nowMs < untilMs) continue;
      this.#excluded.delete(instance);
      if (!this.#plan) this.#replanSoon(SETTLE_MS);
    }
    this.#giveUpIfDue(nowMs);
    this.#replanIfDue();
    if (nowMs - this.#lastPingMs >= PING_EVERY_MS) this.#pingAll(nowMs);
    if (this.#pipeline && this.#pipeline.lastStepAtMs !== this.#lastStepAtMs) {
      this.#lastStepAtMs = this.#pipeline.lastStepAtMs;
      this.#changed = true;
    }
    if (this.#changed && nowMs - this.#lastNotifyMs >= NOTIFY_EVERY_MS) {
      this.#changed = false;
      this.#lastNotifyMs = nowMs;
      for (const listener of this.#listeners) listener();
    }
    this.#timer = clock.after(TICK_EVERY_MS, () => this.#tick());
  }

  /** Sequences do not wait for ever for a pipeline that does not come back. */
  #giveUpIfDue(nowMs: number): void {
    const sinceMs = this.#withoutPipelineSinceMs;
    if (sinceMs === null || !this.#scheduler || nowMs - sinceMs < RECOVER_WITHIN_MS) return;
    // While a new plan loads, its own bounds apply.
    if (this.#assignment) return;
    this.#preemptionsBefore += this.#scheduler.stats.preemptions;
    const message = `The fleet lost its pipeline and could not make another: ${this.#note}`;
    this.#handle(this.#scheduler.abortAll(new FleetError("unavailable", message)));
    this.#scheduler = null;
  }

  #pingAll(nowMs: number): void {
    this.#lastPingMs = nowMs;
    this.#changed = true;
    for (const { card, state } of this.#membership.members) {
      if (state !== "lost") this.#ping(card.worker);
    }
  }

  async #ping(worker: string): Promise<void> {
    const { bus, clock } = this.#options;
    const sentAtMs = clock.unixMs();
    const request: ControlRequest = { type: "ping", sentAtMs };
    try {
      const answer = await bus.request(
        this.#subjects.ctl(worker),
        encodeControl(request),
        PING_TIMEOUT_MS,
      );
      const reply = decodeControl(ControlReply, answer);
      if (reply.type !== "ok" || this.#membership.get(worker)?.state === "lost") return;
      let offset = this.#offsets.get(worker);
      if (!offset) this.#offsets.set(worker, offset = new ClockOffset());
      offset.add(sentAtMs, clock.unixMs(), reply.nowMs);
    } catch { /* beats tell who is gone */ }
  }

  #state(): FleetSnapshot["state"] {
    if (this.#pipeline) return "serving";
    if (this.#assignment) return "loading";
    return this.#membership.usable.length > 0 && this.#excluded.size > 0 ? "failed" : "waiting";
  }

  /** A message at the door; a malformed one is logged and let go. */
  #parse<T>(schema: Parameters<typeof decodeControl<T>>[0], message: BusMessage): T | null {
    try {
      return decodeControl(schema, message.data);
    } catch (error) {
      this.#log.add("warning", `${message.subject}: ${toFleetError(error).message.slice(0, 300)}`);
      return null;
    }
  }

  /** A worker speaks for itself only: its subject, which permissions guard, names it. */
  #isFrom(worker: string, { subject }: BusMessage): boolean {
    return subject.split(".").at(-1) === worker;
  }
}

function isPartOf(
  part: string,
  stage: { from: number; to: number; first: boolean; last: boolean },
) {
  if (part === "embedding") return stage.first;
  if (part === "head") return stage.last;
  const layer = Number(part.slice("layer.".length));
  return stage.from <= layer && layer < stage.to;
}

/** The shortest request there is: one token after one token. */
function canary(config: ModelConfig): GenerateRequest {
  return {
    promptTokens: Uint32Array.of(config.bosToken ?? 0),
    maxTokens: 1,
    temperature: 0,
    topP: 1,
    topK: 0,
    seed: 0n,
    choice: 0,
    presencePenalty: 0,
    frequencyPenalty: 0,
    bias: new Map(),
    alternatives: 0,
    stopTokens: [],
  };
}
