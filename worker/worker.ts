/**
 * A worker as the fleet sees it: it says hello and beats, takes assignments, fetches and loads what
 * they name, serves, and tells how it goes. Bus, clock, parts and GPU are arguments, so the same code
 * runs in a process of its own, in a test, or one day in a browser tab.
 *
 * Nothing here waits for the GPU: loading and steps go on elsewhere and come back as promises.
 *
 * @module
 */
import type { Bus, BusMessage, Subscription } from "../shared/bus.ts";
import type { Clock, Timer } from "../shared/clock.ts";
import { FleetError, toFleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig } from "../shared/model_config.ts";
import {
  type AssignStage,
  type Beat,
  type ControlReply,
  ControlRequest,
  decodeControl,
  encodeControl,
  type PartRef,
  type Subjects,
  type WorkerCard,
  type WorkerReport,
} from "../shared/protocol.ts";
import { judgeAssignment } from "./assignment.ts";
import { createStage, type DropCounts, type Stage, type StageRunner } from "./stage.ts";

/** Where a part is read from. */
export type PartOrigin = Extract<WorkerReport, { type: "progress" }>["from"];

/** How far a part is. */
export interface PartProgress {
  part: string;
  doneBytes: number;
  from: PartOrigin;
}

/** How far a load is. */
export type LoadNote =
  | { type: "part"; progress: PartProgress }
  /** What is being made beside weights, for the log. */
  | { type: "line"; line: string };

/** Where parts come from. `P` is whatever a {@linkcode StageLoader} needs to read one. */
export interface PartProvider<P> {
  /** Digests of the parts that need no download. */
  held(): string[];
  /**
   * Makes parts readable, checked against their digests, in the order asked for.
   *
   * @param onProgress of downloads: what is at hand already is not told
   * @throws FleetError `nats`, `not-found`, `disk`, `bad-checkpoint`; the signal's reason when aborted
   */
  provide(
    parts: PartRef[],
    onProgress: (progress: PartProgress) => void,
    signal: AbortSignal,
  ): Promise<P[]>;
}

/** A stage in GPU memory. */
export interface LoadedStage {
  readonly runner: StageRunner;
  /** Weights, pages, scratch and staging. */
  readonly memoryBytes: number;
  /** Frees pages and scratch; weights stay for the next assignment. */
  destroy(): Promise<void>;
}

/** Who puts a stage onto the GPU. One stage at a time is loaded. */
export interface StageLoader<P> {
  /**
   * @param parts as the {@linkcode PartProvider} gave them, in the assignment's order
   * @throws FleetError `out-of-memory`, `gpu`, `bad-checkpoint`, `disk`
   */
  load(
    assignment: AssignStage,
    config: ModelConfig,
    parts: P[],
    tell: (note: LoadNote) => void,
  ): Promise<LoadedStage>;
}

/** What a worker is made of. */
export interface WorkerOptions<P> {
  bus: Bus;
  clock: Clock;
  subjects: Subjects;
  /** `cachedParts` is filled in from the provider. */
  card: Omit<WorkerCard, "cachedParts">;
  parts: PartProvider<P>;
  loader: StageLoader<P>;
  /** A stage failed while serving; it has been reported. */
  onFailure?: (error: FleetError) => void;
  /** Lines for whoever watches the process. */
  log?: (line: string) => void;
}

/** A card may be large, and anybody may call the roll. */
const HELLO_EVERY_MS = 200;
/** Progress is told at most this often. */
const PROGRESS_EVERY_MS = 200;

/** A worker: {@linkcode FleetWorker.join} makes it part of the fleet. */
export class FleetWorker<P> {
  readonly #options: WorkerOptions<P>;
  readonly #dropped: DropCounts = {};
  #subscriptions: Subscription[] = [];
  #state: Beat["state"] = "idle";
  /** The highest epoch ever assigned. */
  #epoch = 0;
  #stage: Stage | null = null;
  #loaded: LoadedStage | null = null;
  #load: AbortController | null = null;
  /** Settles when the GPU is free for the next load; never rejects. */
  #free: Promise<void> = Promise.resolve();
  /** How the last assignment ended; told again where it may have been lost. */
  #outcome: WorkerReport | null = null;
  #beats = 0;
  #beatTimer: Timer | null = null;
  #helloTimer: Timer | null = null;
  #helloAtMs = -Infinity;
  #closed = false;

  constructor(options: WorkerOptions<P>) {
    this.#options = options;
  }

  /** Subscribes, says hello, and beats from now on. Called once. */
  join(): void {
    const { bus, subjects, card } = this.#options;
    let connected = bus.status === "connected";
    this.#subscriptions = [
      bus.subscribe(subjects.ctl(card.worker), (message) => this.#control(message)),
      bus.subscribe(subjects.call, () => this.#answerRollCall()),
      bus.onStatus((status) => {
        // What was said meanwhile is lost.
        if (status === "connected" && !connected) {
          this.#hello();
          this.#repeatOutcome();
        }
        connected = status === "connected";
      }),
    ];
    this.#hello();
    this.#beat();
  }

  get state(): Beat["state"] {
    return this.#state;
  }

  /** The epoch it loads or serves, or failed at; 0 for none. */
  get epoch(): number {
    return this.#state === "idle" ? 0 : this.#epoch;
  }

  /** Frames dropped so far, by reason. */
  get dropped(): Readonly<DropCounts> {
    return this.#dropped;
  }

  /** The worker cannot go on: tells the fleet why. The caller closes it next. */
  fail(error: FleetError): void {
    this.#stop();
    if (this.#state !== "failed") this.#fail(error);
  }

  /** Tells the fleet that it goes, and stops. Resolves when the server has heard. */
  async leave(): Promise<void> {
    if (this.#closed) return;
    this.#report({ type: "leaving", instance: this.#options.card.instance });
    this.close();
    await this.#options.bus.flush();
  }

  /** Stops beats, stage and subscriptions; the bus stays open. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#beatTimer?.cancel();
    this.#helloTimer?.cancel();
    for (const subscription of this.#subscriptions) subscription.unsubscribe();
    this.#stop();
  }

  #control({ data, respond }: BusMessage): void {
    let reply: ControlReply | null;
    try {
      reply = this.#answer(decodeControl(ControlRequest, data));
    } catch (error) {
      reply = refused(toFleetError(error).message);
    }
    if (reply) respond?.(encodeControl(reply));
  }

  /** @returns null for an order that another process of this name is to answer */
  #answer(request: ControlRequest): ControlReply | null {
    const { card, clock } = this.#options;
    if (request.type !== "ping" && request.instance !== card.instance) return null;
    const ok: ControlReply = { type: "ok", nowMs: clock.unixMs() };
    switch (request.type) {
      case "ping":
        return ok;
      case "release":
        if (request.epoch === this.epoch) this.#release();
        return ok;
      case "assign": {
        const busy = this.#state === "loading" || this.#state === "serving";
        const self = { epoch: this.#epoch, busy };
        const verdict = judgeAssignment(self, request);
        if (verdict.type === "refuse") return refused(verdict.reason);
        if (verdict.type === "known") this.#repeatOutcome();
        else this.#assign(request, verdict.config);
        return ok;
      }
      default:
        return request satisfies never;
    }
  }

  #assign(assignment: AssignStage, config: ModelConfig): void {
    this.#stop();
    this.#epoch = assignment.epoch;
    this.#state = "loading";
    const load = this.#load = new AbortController();
    this.#free = this.#free.then(() => this.#bring(assignment, config, load.signal));
  }

  #release(): void {
    this.#stop();
    this.#state = "idle";
    this.#log(`Released epoch ${this.#epoch}`);
  }

  /** Ends what is loading or serving. The GPU is free once `#free` settles. */
  #stop(): void {
    this.#load?.abort(new FleetError("cancelled", "A newer order came"));
    this.#load = null;
    this.#stage?.close();
    this.#stage = null;
    const loaded = this.#loaded;
    this.#loaded = null;
    this.#outcome = null;
    if (loaded) this.#free = this.#free.then(() => loaded.destroy()).catch(() => {});
  }

  /** From assignment to `ready` or `failed`. Never rejects. */
  async #bring(assignment: AssignStage, config: ModelConfig, signal: AbortSignal): Promise<void> {
    if (signal.aborted) return;
    const { clock, parts, loader } = this.#options;
    const startMs = clock.nowMs();
    const { from, to } = assignment.stage;
    try {
      this.#log(`Epoch ${assignment.epoch}: loading layers ${from} to ${to - 1}`);
      const fetched = this.#progress(assignment, signal);
      const readable = await parts.provide(assignment.parts, fetched, signal);
      signal.throwIfAborted();
      const onGpu = this.#progress(assignment, signal);
      const loaded = await loader.load(assignment, config, readable, (note) => {
        if (note.type === "part") onGpu(note.progress);
        else this.#log(`Epoch ${assignment.epoch}: ${note.line}`);
      });
      if (signal.aborted) return await loaded.destroy();
      this.#serve(assignment, config, loaded, clock.nowMs() - startMs);
    } catch (error) {
      if (!signal.aborted) this.#fail(toFleetError(error));
    }
  }

  #serve(
    assignment: AssignStage,
    config: ModelConfig,
    loaded: LoadedStage,
    loadMs: number,
  ): void {
    const { bus, clock, subjects, card } = this.#options;
    this.#loaded = loaded;
    this.#stage = createStage({
      bus,
      clock,
      subjects,
      worker: card.worker,
      instance: card.instance,
      assignment,
      config,
      runner: loaded.runner,
      dropped: this.#dropped,
      onFailure: (error) => {
        this.#failed(error);
        this.#options.onFailure?.(error);
      },
    });
    this.#state = "serving";
    const { epoch } = assignment;
    this.#outcome = { type: "ready", instance: card.instance, epoch, loadMs };
    this.#repeatOutcome();
    this.#log(`Epoch ${epoch}: serving after ${(loadMs / 1000).toFixed(1)} s`);
  }

  #fail(error: FleetError): void {
    this.#failed(error);
    this.#repeatOutcome();
  }

  /** Takes note of a failure. */
  #failed(error: FleetError): void {
    const { instance } = this.#options.card;
    const message = error.message.slice(0, 4096);
    this.#state = "failed";
    this.#outcome = { type: "failed", instance, epoch: this.#epoch, code: error.code, message };
    this.#log(`Epoch ${this.#epoch} failed: ${error.message}`);
  }

  #repeatOutcome(): void {
    if (this.#outcome) this.#report(this.#outcome);
  }

  /** Reports progress over all parts of a stage, now and then, and its end for sure. */
  #progress(assignment: AssignStage, signal: AbortSignal): (progress: PartProgress) => void {
    const { card, clock } = this.#options;
    const { epoch, parts } = assignment;
    const totalBytes = parts.reduce((sum, { bytes }) => sum + bytes, 0);
    const done = new Map<string, number>();
    let lastMs = -Infinity;
    return ({ part, doneBytes: partBytes, from }) => {
      if (signal.aborted) return;
      done.set(part, partBytes);
      const sum = [...done.values()].reduce((a, b) => a + b, 0),
        doneBytes = Math.min(sum, totalBytes);
      const nowMs = clock.nowMs();
      if (doneBytes < totalBytes && nowMs < lastMs + PROGRESS_EVERY_MS) return;
      lastMs = nowMs;
      const { instance } = card;
      this.#report({ type: "progress", instance, epoch, part, doneBytes, totalBytes, from });
    };
  }

  /** However often the roll is called, cards follow each other at a decent distance. */
  #answerRollCall(): void {
    if (this.#helloTimer) return;
    const { clock } = this.#options;
    const delayMs = this.#helloAtMs + HELLO_EVERY_MS - clock.nowMs();
    if (delayMs <= 0) return this.#hello();
    this.#helloTimer = clock.after(delayMs, () => this.#hello());
  }

  #hello(): void {
    const { clock, subjects, card, parts } = this.#options;
    this.#helloTimer?.cancel();
    this.#helloTimer = null;
    this.#helloAtMs = clock.nowMs();
    const cachedParts = parts.held().slice(0, MAX_CACHED_PARTS);
    const hello: WorkerCard = { ...card, cachedParts };
    this.#publish(subjects.hello(card.worker), hello);
  }

  #beat(): void {
    const { clock, subjects, card } = this.#options;
    const beat: Beat = {
      worker: card.worker,
      instance: card.instance,
      sequence: this.#beats++,
      sentAtMs: clock.unixMs(),
      epoch: this.epoch,
      state: this.#state,
      dropped: this.#dropped,
    };
    this.#publish(subjects.beat(card.worker), beat);
    this.#beatTimer = clock.after(LIMITS.beatEveryMs, () => this.#beat());
  }

  #report(report: WorkerReport): void {
    const { subjects, card } = this.#options;
    this.#publish(subjects.report(card.worker), report);
  }

  #publish(subject: string, message: Beat | WorkerCard | WorkerReport): void {
    const { bus } = this.#options;
    if (bus.status !== "closed") bus.publish(subject, encodeControl(message));
  }

  #log(line: string): void {
    this.#options.log?.(line);
  }
}

/** So that a card stays within `LIMITS.maxControlBytes`: a digest takes 67 bytes. */
const MAX_CACHED_PARTS = 3_000;

function refused(reason: string): ControlReply {
  return { type: "refused", reason: reason.slice(0, 4096) };
}
