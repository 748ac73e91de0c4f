/**
 * Continuous batching over one pipeline: sequences in, steps out, results in, tokens out. Pure: no
 * clock, no sockets; the same calls make the same steps.
 *
 * - A sequence is in at most one step in flight. Running sequences are spread over the steps in
 *   flight, so that every stage of the pipeline has work.
 * - Decode rows come first; sequences that catch up (prompts, replays) share the rest of the step's
 *   rows, taking turns. Prompt tokens are prefill rows, generated tokens decode rows, in a replay
 *   too: so a replay repeats the arithmetic bit for bit.
 * - Waiting sequences are admitted in the order of their submission, once pages for all their known
 *   tokens are free. When a running sequence lacks a page, the youngest one loses its pages and is
 *   replayed later. A sequence only ever takes pages from younger ones, so the oldest always moves.
 *
 * @module
 */
import { FleetError, invariant } from "../shared/errors.ts";
import type { RowResult, StepBatch } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import { reasonItCannotRun } from "./admission.ts";
import type { TokenLogprob } from "./engine.ts";
import { KvAllocator, pagesFor } from "./kv_allocator.ts";
import {
  appendToken,
  createSequence,
  finishReason,
  isDecoding,
  type Sequence,
  type SubmittedSequence,
} from "./sequence.ts";
import {
  requestEntries,
  samplesOf,
  type StepBounds,
  StepBuilder,
  type StepEntry,
} from "./step_builder.ts";

export type { SubmittedSequence } from "./sequence.ts";
export type { StepBounds, StepShape } from "./step_builder.ts";

/** What the scheduler may use; fixed for an epoch. */
export interface SchedulerConfig extends StepBounds {
  /** Stages of the pipeline. */
  stages: number;
  /** Steps on their way at once. */
  maxStepsInFlight: number;
  /** Rows of a step that catch up (prefill, replay), beside its decode rows. */
  prefillRowsPerStep: number;
  /** KV pages of the pipeline. */
  pages: number;
  /** Longest sequence, prompt and answer, tokens; what all pages hold is a bound beside it. */
  contextTokens: number;
  /** Sequences waiting or running; past it `submit` refuses. */
  maxQueuedSequences: number;
}

/** A step to send. */
export interface ScheduledStep {
  /** Grows by one, from 1 in every epoch. */
  step: number;
  batch: StepBatch;
  /** Whose `batch.sequences[i]` is. */
  sequences: string[];
}

/** What happened to a sequence. `finish` and `error` are its last event. */
export type SchedulerEvent =
  | ({ id: string; type: "token"; alternatives: TokenLogprob[] } & TokenLogprob)
  | { id: string; type: "finish"; reason: "stop" | "length" }
  | { id: string; type: "error"; error: FleetError };

/** Counts for the snapshot. */
export interface SchedulerStats {
  running: number;
  waiting: number;
  pages: number;
  pagesUsed: number;
  stepsInFlight: number;
  preemptions: number;
}

/**
 * How many steps should be in flight: one per stage keeps every stage busy only if hops take no
 * time; a quarter more covers hops of up to a quarter of a step. If one stage is slow, all of them
 * queue there.
 */
export function stepsToKeepInFlight(stages: number, maxStepsInFlight: number): number {
  const wanted = stages + Math.ceil(stages / 4);
  return Math.min(maxStepsInFlight, wanted, LIMITS.maxQueuedFramesPerStage);
}

/** Rounds of all steps in flight after which a sequence that was passed over goes first. */
const OVERDUE_ROUNDS = 4;

/** The scheduler of one pipeline. */
export class Scheduler {
  #config: SchedulerConfig;
  #kv: KvAllocator;
  #sequences = new Map<string, Sequence>();
  /** Without pages, oldest first. */
  #waiting: Sequence[] = [];
  #running = new Set<Sequence>();
  #inFlight = new Map<number, { batch: StepBatch; entries: StepEntry[] }>();
  /** The oldest sequence that lacks a page: nobody younger may take one before it. */
  #starved: Sequence | null = null;
  #nextStep = 1;
  #nextAge = 0;
  #preemptions = 0;

  constructor(config: SchedulerConfig) {
    this.#config = config;
    this.#kv = new KvAllocator(config.pages);
  }

  get stats(): SchedulerStats {
    return {
      running: this.#running.size,
      waiting: this.#waiting.length,
      pages: this.#kv.pages,
      pagesUsed: this.#kv.used,
      stepsInFlight: this.#inFlight.size,
      preemptions: this.#preemptions,
    };
  }

  /** The longest sequence that this pipeline can hold, tokens. */
  get contextTokens(): number {
    return Math.min(this.#config.contextTokens, this.#config.pages * LIMITS.pageTokens);
  }

  /**
   * Queues a sequence.
   *
   * @throws FleetError `too-large` when it could never run, `overloaded` when the queue is full
   */
  submit(submitted: SubmittedSequence): void {
    invariant(!this.#sequences.has(submitted.id), `sequence ${submitted.id} is there already`);
    invariant(submitted.maxTokens >= 1, "a sequence generates at least one token");
    const sequence = createSequence(submitted, this.#nextAge);
    const error = reasonItCannotRun(sequence, this.contextTokens, this.#config);
    if (error) throw error;
    if (this.#sequences.size >= this.#config.maxQueuedSequences) {
      throw new FleetError(
        "overloaded",
        `All ${this.#config.maxQueuedSequences} places are taken; try again later`,
      );
    }
    this.#nextAge++;
    this.#sequences.set(sequence.id, sequence);
    this.#waiting.push(sequence);
  }

  /** No later step names the sequence; its pages are free once its step in flight returns. */
  cancel(id: string): void {
    const sequence = this.#sequences.get(id);
    if (!sequence || sequence.cancelled) return;
    if (sequence.step === null) {
      this.#forget(sequence);
    } else {
      sequence.cancelled = true;
      this.#kv.release(id);
      this.#unstarve(sequence);
    }
  }

  /** The next step to send, or null when nothing can move or enough is in flight. */
  nextStep(): ScheduledStep | null {
    const slots = this.#targetSteps() - this.#inFlight.size;
    if (slots <= 0) return null;
    this.#admit();
    const builder = new StepBuilder(this.#config);
    const ready = [...this.#running]
      .filter((sequence) => sequence.step === null)
      .sort((a, b) => a.lastStep - b.lastStep || a.age - b.age);
    this.#addOverdue(builder, ready);
    const decoding = ready.filter(isDecoding);
    const catchingUp = ready.filter((sequence) => !isDecoding(sequence));
    this.#addDecodeRows(builder, decoding, catchingUp.length > 0, slots);
    this.#addCatchUpRows(builder, catchingUp, slots);
    if (builder.entries.length === 0) return null;
    const step = this.#nextStep++;
    const batch = builder.build();
    this.#inFlight.set(step, { batch, entries: builder.entries });
    return { step, batch, sequences: builder.entries.map(({ sequence }) => sequence.id) };
  }

  /**
   * Takes in the results of a step in flight.
   *
   * @returns its tokens and ends, in the order of the step's requests
   * @throws FleetError `bad-frame` when the results do not answer the step's requests
   */
  complete(step: number, results: readonly RowResult[]): SchedulerEvent[] {
    const flight = this.#inFlight.get(step);
    invariant(flight, `step ${step} is not in flight`);
    const answers = samplesOf(flight.batch, results);
    this.#inFlight.delete(step);
    this.#kv.unpin(step);
    for (const { sequence, to } of flight.entries) {
      sequence.step = null;
      sequence.computed = to;
    }
    const events: SchedulerEvent[] = [];
    for (const [index, { sequence }] of requestEntries(flight.entries, flight.batch).entries()) {
      if (!sequence.cancelled) this.#takeToken(sequence, answers[index], events);
    }
    for (const { sequence } of flight.entries) {
      if (sequence.cancelled) this.#forget(sequence);
      else if (sequence.evicted && this.#running.has(sequence)) this.#startOver(sequence);
    }
    return events;
  }

  /**
   * A new epoch: every step in flight is void and all KV is gone. Sequences keep their tokens and are
   * replayed in order of age; what they generate next is the same as if nothing had happened.
   *
   * @returns an `error` event for each sequence that the new plan can no longer hold
   */
  requeueAll(config: SchedulerConfig = this.#config): SchedulerEvent[] {
    this.#config = config;
    this.#kv = new KvAllocator(config.pages);
    this.#inFlight.clear();
    this.#nextStep = 1;
    this.#starved = null;
    this.#running.clear();
    this.#waiting = [];
    const events: SchedulerEvent[] = [];
    const all = [...this.#sequences.values()].sort((a, b) => a.age - b.age);
    for (const sequence of all) {
      sequence.step = null;
      sequence.computed = 0;
      sequence.evicted = false;
      const error = sequence.cancelled
        ? null
        : reasonItCannotRun(sequence, this.contextTokens, config);
      if (error) events.push({ id: sequence.id, type: "error", error });
      if (error || sequence.cancelled) this.#sequences.delete(sequence.id);
      else this.#waiting.push(sequence);
    }
    return events;
  }

  /** Ends every sequence with `error`; steps in flight are void. */
  abortAll(error: FleetError): SchedulerEvent[] {
    const ids = [...this.#sequences.values()].filter((sequence) => !sequence.cancelled);
    this.#sequences.clear();
    this.requeueAll();
    return ids.map(({ id }) => ({ id, type: "error", error }));
  }

  /** Checks every page and sequence; for tests. */
  check(): void {
    this.#kv.check();
    for (const sequence of this.#waiting) {
      invariant(this.#kv.table(sequence.id).length === 0, `${sequence.id} waits with pages`);
    }
    const { waiting, running } = this.stats;
    invariant(waiting + running === this.#sequences.size, "a sequence is lost");
    if (running + waiting === 0) invariant(this.#kv.used === 0, "pages leak");
  }

  // ── Picking rows ────────────────────────────────────────────────────────────────────────────

  #targetSteps(): number {
    return stepsToKeepInFlight(this.#config.stages, this.#config.maxStepsInFlight);
  }

  /**
   * Whoever has been passed over for longest goes first once the wait is long, whatever it brings: so
   * that no mix of requests starves one that finds every step full.
   */
  #addOverdue(builder: StepBuilder, ready: Sequence[]): void {
    const first = ready[0];
    if (first && this.#nextStep - first.lastStep > OVERDUE_ROUNDS * this.#targetSteps()) {
      this.#addRows(builder, first, this.#config.prefillRowsPerStep);
    }
  }

  /** Decode rows of this microbatch: an even share of all that decode, so that steps stay alike. */
  #addDecodeRows(builder: StepBuilder, ready: Sequence[], leaveRoom: boolean, slots: number): void {
    const { maxRows, maxSequencesPerStep, maxOutputs } = this.#config;
    const evenly = Math.ceil(this.#running.size / this.#targetSteps());
    const share = Math.min(Math.ceil(ready.length / slots), evenly);
    // A quarter of the step stays free while somebody catches up.
    const bound = Math.min(maxRows, maxSequencesPerStep, maxOutputs);
    const most = leaveRoom ? Math.max(1, Math.floor(bound * 3 / 4)) : bound;
    let room = Math.min(share, most);
    for (const sequence of ready) {
      if (room === 0) break;
      if (this.#addRows(builder, sequence, 1)) room--;
    }
  }

  /** Rows of sequences that catch up: an even share of them, under the row budget. */
  #addCatchUpRows(builder: StepBuilder, ready: Sequence[], slots: number): void {
    let share = Math.ceil(ready.length / slots);
    let budget = this.#config.prefillRowsPerStep;
    for (const sequence of ready) {
      if (share === 0 || budget === 0) break;
      const entry = this.#addRows(builder, sequence, budget);
      if (!entry) continue;
      budget -= entry.to - entry.from;
      share--;
    }
  }

  #addRows(builder: StepBuilder, sequence: Sequence, wanted: number): StepEntry | null {
    // It may be in the step already, or have lost its pages to an older one since the list was made.
    const taken = sequence.step !== null || !this.#running.has(sequence);
    if (taken || !this.#coverTokens(sequence)) return null;
    const entry = builder.add(sequence, wanted, this.#kv.table(sequence.id));
    if (!entry) return null;
    sequence.step = this.#nextStep;
    sequence.lastStep = this.#nextStep;
    this.#kv.pin(this.#nextStep, entry.pages);
    return entry;
  }

  // ── Pages ───────────────────────────────────────────────────────────────────────────────────

  /** Lets waiting sequences in, in order, while each can have pages for all of its known tokens. */
  #admit(): void {
    const mostRunning = this.#config.maxSequencesPerStep * this.#targetSteps();
    while (this.#waiting.length > 0 && !this.#starved && this.#running.size < mostRunning) {
      const sequence = this.#waiting[0];
      // Each running sequence may soon want one more page: without this reserve the newcomer would
      // be the next to be preempted.
      const reserve = this.#running.size;
      const wanted = pagesFor(sequence.tokens.length);
      if (this.#kv.free < wanted + reserve) return;
      invariant(this.#kv.grow(sequence.id, sequence.tokens.length), "free pages were counted");
      this.#waiting.shift();
      this.#running.add(sequence);
      sequence.lastStep = this.#nextStep;
    }
  }

  /** Makes sure of pages for all known tokens, taking them from younger sequences if need be. */
  #coverTokens(sequence: Sequence): boolean {
    const missing = this.#kv.missing(sequence.id, sequence.tokens.length);
    if (missing === 0) return true;
    if (this.#starved && this.#starved.age < sequence.age) return false;
    while (this.#kv.free + this.#kv.leaving < missing) {
      const victim = this.#youngest();
      if (victim === sequence) break;
      this.#evict(victim);
    }
    if (this.#kv.grow(sequence.id, sequence.tokens.length)) {
      this.#unstarve(sequence);
      return true;
    }
    this.#starved = sequence;
    return false;
  }

  #youngest(): Sequence {
    let youngest: Sequence | null = null;
    for (const sequence of this.#running) {
      if (sequence.evicted || sequence.cancelled) continue;
      if (!youngest || sequence.age > youngest.age) youngest = sequence;
    }
    invariant(youngest, "somebody asked for the page");
    return youngest;
  }

  /** Takes the pages of a running sequence; it starts over, at once or when its step returns. */
  #evict(sequence: Sequence): void {
    this.#preemptions++;
    this.#kv.release(sequence.id);
    if (sequence.step === null) this.#startOver(sequence);
    else sequence.evicted = true;
  }

  #startOver(sequence: Sequence): void {
    sequence.evicted = false;
    sequence.computed = 0;
    this.#running.delete(sequence);
    const at = this.#waiting.findIndex(({ age }) => age > sequence.age);
    this.#waiting.splice(at < 0 ? this.#waiting.length : at, 0, sequence);
    this.#unstarve(sequence);
  }

  #unstarve(sequence: Sequence): void {
    if (this.#starved === sequence) this.#starved = null;
  }

  // ── The course of a sequence ────────────────────────────────────────────────────────────────

  #takeToken(
    sequence: Sequence,
    answer: Extract<RowResult, { type: "sample" }>,
    events: SchedulerEvent[],
  ): void {
    const { id } = sequence;
    const alternatives = Array.from(answer.alternativeTokens, (token, i) => ({
      token,
      logprob: answer.alternativeLogprobs[i],
    }));
    appendToken(sequence, answer.token);
    events.push({
      id,
      type: "token",
      token: answer.token,
      logprob: answer.logprob,
      alternatives,
    });
    const reason = finishReason(sequence, this.contextTokens);
    if (!reason) return;
    events.push({ id, type: "finish", reason });
    this.#forget(sequence);
  }

  #forget(sequence: Sequence): void {
    this.#sequences.delete(sequence.id);
    this.#running.delete(sequence);
    this.#waiting = this.#waiting.filter((other) => other !== sequence);
    this.#kv.release(sequence.id);
    this.#unstarve(sequence);
  }
}
