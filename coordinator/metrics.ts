/**
 * What Prometheus reads: counters of the API, and the figures taken from the fleet's snapshot when the
 * page is asked for. Labels are bounded: routes, statuses and codes are ours, stages and workers are
 * those of the moment.
 *
 * @module
 */
import { Counter, Gauge, Histogram, Registry } from "prom-client";
import type { FleetSnapshot, StageSnapshot } from "./snapshot.ts";

const STATES = ["waiting", "loading", "serving", "failed"] as const;
const PARTS = ["wire", "queue", "gpu", "readback", "total"] as const;
const QUANTILES = { p50: "0.5", p95: "0.95", p99: "0.99" } as const;
/** Reasons beyond these many of one worker are counted as "other". */
const MAX_REASONS = 16;

/** Upper bounds of the histograms' buckets, seconds. */
const FIRST_TOKEN_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60];
const NEXT_TOKEN_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5];
const REQUEST_S = [0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300];

/** The coordinator's metrics; one per process or test, nothing global. */
export class Metrics {
  readonly #registry = new Registry();
  readonly #requests = this.#counter(
    "fleet_http_requests_total",
    "Requests answered (a stream when it begins)",
    ["route", "status"],
  );
  readonly #requestSeconds = this.#histogram(
    "fleet_http_request_seconds",
    "Time to an answer (to the head of a stream)",
    REQUEST_S,
    ["route"],
  );
  readonly #streamFailures = this.#counter(
    "fleet_stream_failures_total",
    "Streams that ended with an error event, or whose client went away",
    ["code"],
  );
  readonly #firstToken = this.#histogram(
    "fleet_time_to_first_token_seconds",
    "From a sequence's admission to its first token",
    FIRST_TOKEN_S,
  );
  readonly #nextToken = this.#histogram(
    "fleet_inter_token_seconds",
    "Between two tokens of a sequence",
    NEXT_TOKEN_S,
  );
  readonly #promptTokens = this.#counter("fleet_prompt_tokens_total", "Prompt tokens admitted");
  readonly #generatedTokens = this.#counter(
    "fleet_generated_tokens_total",
    "Tokens drawn for clients",
  );
  readonly #fleet = fleetMetrics(this.#registry);

  /** The content type of {@linkcode page}. */
  get contentType(): string {
    return this.#registry.contentType;
  }

  /** A request was answered. `route` is a pattern of the route table, or "other". */
  request(route: string, status: number, seconds: number): void {
    this.#requests.inc({ route, status: String(status) });
    this.#requestSeconds.observe({ route }, seconds);
  }

  /** A stream ended with an error event. */
  streamFailed(code: string): void {
    this.#streamFailures.inc({ code });
  }

  /** A sequence's first token came `ms` after its admission. */
  firstToken(ms: number): void {
    this.#firstToken.observe(ms / 1000);
    this.#generatedTokens.inc();
  }

  /** A later token came `ms` after the one before. */
  nextToken(ms: number): void {
    this.#nextToken.observe(ms / 1000);
    this.#generatedTokens.inc();
  }

  /** Prompts of together `count` tokens were admitted. */
  promptTokens(count: number): void {
    this.#promptTokens.inc(count);
  }

  /** The whole page in Prometheus' text format. */
  page(snapshot: FleetSnapshot): Promise<string> {
    setFleetMetrics(this.#fleet, snapshot);
    return this.#registry.metrics();
  }

  #counter(name: string, help: string, labelNames: string[] = []): Counter {
    return new Counter({ name, help, labelNames, registers: [this.#registry] });
  }

  #histogram(name: string, help: string, buckets: number[], labelNames: string[] = []): Histogram {
    return new Histogram({ name, help, buckets, labelNames, registers: [this.#registry] });
  }
}

function fleetMetrics(registry: Registry) {
  const gauge = (name: string, help: string, labelNames: string[] = []) =>
    new Gauge({ name: `fleet_${name}`, help, labelNames, registers: [registry] });
  const total = (name: string, help: string, labelNames: string[] = []) =>
    new Counter({ name: `fleet_${name}_total`, help, labelNames, registers: [registry] });
  return {
    state: gauge("state", "1 for the state the fleet is in", ["state"]),
    epoch: gauge("plan_epoch", "Epoch of the current plan, 0 without one"),
    attempt: gauge("plan_attempt", "Attempt of the current epoch"),
    predictedTokenMs: gauge("token_predicted_ms", "Predicted latency of one token, ms"),
    measuredTokenMs: gauge("token_measured_ms", "Measured latency of one token, ms"),
    predictedRate: gauge("predicted_tokens_per_second", "Predicted rate of the full pipeline"),
    rate: gauge("tokens_per_second", "Measured rate over the last seconds"),
    running: gauge("sequences_running", "Sequences running"),
    waiting: gauge("sequences_waiting", "Sequences waiting for a place"),
    pages: gauge("kv_pages", "KV pages of the plan"),
    pagesUsed: gauge("kv_pages_used", "KV pages in use"),
    steps: gauge("steps_in_flight", "Steps in flight"),
    tokens: total("tokens_drawn", "Tokens drawn since start, canaries included"),
    sequences: total("sequences", "Sequences admitted since start"),
    preemptions: total("preemptions", "Sequences preempted since start"),
    reissues: total("reissues", "Attempts raised since start"),
    latency: gauge("stage_latency_ms", "A step's time at a stage, ms", [
      "stage",
      "worker",
      "part",
      "quantile",
    ]),
    predicted: gauge("stage_predicted_ms", "Predicted time of a decode step, ms", [
      "stage",
      "worker",
    ]),
    busy: gauge("stage_busy_ratio", "Share of the last seconds its GPU was busy", [
      "stage",
      "worker",
    ]),
    memory: gauge("worker_memory_bytes", "GPU memory a worker offers", ["worker"]),
    used: gauge("worker_used_bytes", "GPU memory its stage takes", ["worker"]),
    workerState: gauge("worker_state", "1 for the state a worker is in", ["worker", "state"]),
    beatAge: gauge("worker_beat_age_ms", "Since a worker's last beat, ms", ["worker"]),
    rejected: total("coordinator_dropped", "Frames and messages the coordinator did not take", [
      "reason",
    ]),
    dropped: total("worker_dropped_frames", "Frames a worker dropped", ["worker", "reason"]),
  };
}

/**
 * Everything is emptied first: what left the fleet leaves the page, and totals, which the fleet counts
 * itself, are set by counting up to them.
 */
function setFleetMetrics(metrics: ReturnType<typeof fleetMetrics>, snapshot: FleetSnapshot): void {
  for (const metric of Object.values(metrics)) metric.reset();
  const { load, plan } = snapshot;
  for (const state of STATES) metrics.state.set({ state }, state === snapshot.state ? 1 : 0);
  metrics.epoch.set(plan?.epoch ?? 0);
  metrics.attempt.set(plan?.attempt ?? 0);
  metrics.predictedTokenMs.set(plan?.predictedTokenMs ?? 0);
  metrics.measuredTokenMs.set(plan?.measuredTokenMs ?? 0);
  metrics.predictedRate.set(plan?.predictedTokensPerSecond ?? 0);
  metrics.rate.set(load.tokensPerSecond);
  metrics.running.set(load.running);
  metrics.waiting.set(load.waiting);
  metrics.pages.set(load.pages);
  metrics.pagesUsed.set(load.pagesUsed);
  metrics.steps.set(load.stepsInFlight);
  metrics.tokens.inc(load.tokensTotal);
  metrics.sequences.inc(load.sequencesTotal);
  metrics.preemptions.inc(load.preemptionsTotal);
  metrics.reissues.inc(load.reissuesTotal);
  for (const [reason, count] of Object.entries(snapshot.dropped)) {
    metrics.rejected.inc({ reason }, count);
  }
  for (const stage of plan?.stages ?? []) setStageMetrics(metrics, stage);
  for (const { worker, memoryBytes, usedBytes, state, beatAgeMs, dropped } of snapshot.workers) {
    metrics.memory.set({ worker }, memoryBytes);
    metrics.used.set({ worker }, usedBytes);
    metrics.workerState.set({ worker, state }, 1);
    metrics.beatAge.set({ worker }, beatAgeMs);
    for (const [at, [reason, count]] of Object.entries(dropped).entries()) {
      metrics.dropped.inc({ worker, reason: at < MAX_REASONS ? reason : "other" }, count);
    }
  }
}

function setStageMetrics(metrics: ReturnType<typeof fleetMetrics>, stage: StageSnapshot): void {
  const labels = { stage: String(stage.index), worker: stage.worker };
  metrics.predicted.set(labels, stage.predictedMs);
  if (stage.busy !== null) metrics.busy.set(labels, stage.busy);
  if (stage.latency === null) return;
  for (const part of PARTS) {
    for (const [key, quantile] of Object.entries(QUANTILES)) {
      const value = stage.latency[part][key as keyof typeof QUANTILES];
      metrics.latency.set({ ...labels, part, quantile }, value);
    }
  }
}
