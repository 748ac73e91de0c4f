/**
 * Which worker holds which layers, with how many KV pages, and how fast that should be. Pure: cards
 * and sizes in, a plan or a refusal in words out.
 *
 * @module
 */
import { stepFrameBytes } from "../shared/codec.ts";
import { FleetError } from "../shared/errors.ts";
import {
  kvBindingBytesPerPage,
  kvPageBytes,
  layerCodebookBytes,
  partBytes,
  stageFootprint,
} from "../shared/footprint.ts";
import { LIMITS } from "../shared/limits.ts";
import type { ModelConfig, PartName } from "../shared/model_config.ts";
import type { StageLimits, WorkerCard } from "../shared/protocol.ts";
import { pagesFor } from "./kv_allocator.ts";
import {
  bottleneckMs,
  type Candidate,
  type Ends,
  latencyMs,
  place,
  type Placement,
} from "./placement.ts";

/** A worker that may get a stage. */
export interface PlanWorker {
  card: WorkerCard;
  /** Median round trip of a control message, ms. */
  roundTripMs: number;
  /** What its connection carries, bytes per ms; unknown when absent. */
  bytesPerMs?: number;
}

/** What to plan for. */
export interface PlanRequest {
  config: ModelConfig;
  /** Bytes of each part as it is stored; the part's size on the GPU is worked out from `config`. */
  partBytes: ReadonlyMap<PartName, number>;
  workers: readonly PlanWorker[];
  /** A context that every plan must hold at least once, and how many sequences of it to aim for. */
  wish: { contextTokens: number; maxSequences: number };
  /** The quickest token, the most tokens, or all workers as evenly as possible. */
  objective: "latency" | "throughput" | "spread";
  /** Exactly this many stages where memory and layers allow it, else as many as possible below. */
  stages?: number;
  /** The largest frame that the bus carries. */
  maxFrameBytes: number;
}

/** A stage of a plan. */
export interface PlanStage extends Ends {
  worker: string;
  instance: string;
  /** Layers `[from, to)`. */
  from: number;
  to: number;
  weightBytes: number;
  kvBytes: number;
  scratchBytes: number;
  /** One decode step of one row at this stage, ms. */
  predictedMs: number;
}

/** A plan. */
export interface Plan {
  stages: PlanStage[];
  limits: StageLimits;
  /** One token through the empty pipeline, hops included, ms. */
  predictedTokenMs: number;
  /** With every stage busy and one row in each step; steps of several rows do better. */
  predictedTokensPerSecond: number;
  /** A sentence about each worker. */
  explanation: string[];
}

/**
 * Places the model.
 *
 * KV pages for all sequences of the wish are tried first; when memory is short, as many as fit, down
 * to one whole context.
 *
 * @throws FleetError `out-of-memory` that says how much is missing; `unavailable` without workers;
 * `too-large` when not even one row fits a frame
 *
 * @example
 * ```ts ignore
 * const plan = planStages({
 *   config, partBytes, workers, maxFrameBytes: bus.maxPayloadBytes,
 *   wish: { contextTokens: 8192, maxSequences: 16 }, objective: "throughput",
 * });
 * ```
 */
export function planStages(request: PlanRequest): Plan {
  const { workers, config, objective } = request;
  if (workers.length === 0) {
    throw new FleetError("unavailable", "Cannot place the model: no worker has joined");
  }
  const most = Math.min(workers.length, config.layers);
  let stages = request.stages ?? (objective === "spread" ? most : undefined);
  if (stages !== undefined) stages = Math.min(stages, most);
  let found = placeWithPages(request, stages);
  while (!found && stages !== undefined && stages > 1) found = placeWithPages(request, --stages);
  if (!found) throw doesNotFit(request, limitsOf(request, pagesFor(contextOf(request))));
  const { limits, candidates, placement } = found;
  return {
    stages: planStagesOf(request, found),
    limits,
    predictedTokenMs: latencyMs(candidates, placement),
    predictedTokensPerSecond: 1000 / bottleneckMs(candidates, placement),
    explanation: explain(request, found),
  };
}

interface Found {
  limits: StageLimits;
  candidates: Candidate[];
  placement: Placement;
}

/** The placement with the most KV pages, up to those for all sequences of the wish. */
function placeWithPages(request: PlanRequest, stages: number | undefined): Found | null {
  const { workers, config, objective, wish } = request;
  const attempt = (pages: number): Found | null => {
    const limits = limitsOf(request, pages);
    const candidates = workers.map((worker) => candidateOf(request, worker, limits));
    const placement = place({ candidates, layers: config.layers, objective, stages });
    return placement && { limits, candidates, placement };
  };
  let fits = pagesFor(contextOf(request));
  let tooMany = fits * wish.maxSequences;
  let found = attempt(tooMany) ?? attempt(fits);
  if (!found || found.limits.pages === tooMany) return found;
  while (tooMany - fits > 1) {
    const middle = (fits + tooMany) >> 1;
    const better = attempt(middle);
    if (better) [found, fits] = [better, middle];
    else tooMany = middle;
  }
  return found;
}

function contextOf({ wish, config }: PlanRequest): number {
  return Math.min(wish.contextTokens, config.contextTokens);
}

/**
 * The bounds of a step that fit a frame at every stage. Page tables may take a quarter of the frame
 * here; the scheduler counts the real bytes of each step.
 */
function limitsOf(request: PlanRequest, pages: number): StageLimits {
  const contextTokens = contextOf(request);
  const { config, workers, wish, maxFrameBytes } = request;
  const maxBytes = Math.min(maxFrameBytes, LIMITS.maxFrameBytes);
  const shape = (rows: number, sequences: number) => ({
    rows,
    sequences,
    pageEntries: 0,
    requests: sequences,
    biasEntries: 0,
    countEntries: 0,
    hiddenSize: config.hiddenSize,
    // A single stage gets no activations; plan as if there were two, so that a later plan of this
    // model has the same bounds.
    stages: Math.max(2, Math.min(workers.length, config.layers)),
  });
  const sequences = Math.min(wish.maxSequences, LIMITS.maxSequencesPerStep);
  const tables = Math.min(maxBytes / 4, sequences * pagesFor(contextTokens) * 4);
  const empty = stepFrameBytes(shape(0, sequences)) + tables;
  const rowBytes = stepFrameBytes(shape(1, 0)) - stepFrameBytes(shape(0, 0));
  const maxRows = Math.min(LIMITS.maxRowsPerStep, Math.floor((maxBytes - empty) / rowBytes));
  if (maxRows < 1) {
    throw new FleetError(
      "too-large",
      `One row of this model takes a frame of ${Math.ceil(empty + rowBytes)} bytes, and NATS ` +
        `carries ${maxBytes}; raise max_payload`,
    );
  }
  return {
    maxRows,
    maxSequences: Math.min(sequences, maxRows),
    maxOutputs: Math.min(sequences, maxRows, LIMITS.maxOutputsPerStep),
    pages,
    contextTokens,
  };
}

function candidateOf(request: PlanRequest, worker: PlanWorker, limits: StageLimits): Candidate {
  const { config, partBytes: stored } = request;
  const { card } = worker;
  const { denseBytesPerMs, overheadMsPerLayer } = card.calibration;
  const layerBytes = Math.max(...layerParts(config).map((part) => bytesOf(stored, config, part)));
  const readBytes = layerBytes - layerCodebookBytes(config);
  const layerMs = readBytes / layerBytesPerMs(config, card) + overheadMsPerLayer;
  const headMs = bytesOf(stored, config, "head") / denseBytesPerMs + overheadMsPerLayer;
  const kvBytes = limits.pages * kvPageBytes(config);
  const bindable = limits.pages * kvBindingBytesPerPage(config) <= card.maxBindingBytes;
  const activationMs = worker.bytesPerMs ? config.hiddenSize * 2 / worker.bytesPerMs : 0;
  return {
    stageMs: (layers, { last }) => layers * layerMs + (last ? headMs : 0),
    // Half a round trip to come in and half to go out, and the activations twice through its line.
    hopMs: worker.roundTripMs + 2 * activationMs,
    capacity: (ends) => {
      if (!bindable) return 0;
      const bare = stageFootprint(config, { from: 0, to: 0, ...ends }, limits);
      const parts = (ends.first ? bytesOf(stored, config, "embedding") : 0) +
        (ends.last ? bytesOf(stored, config, "head") : 0);
      const room = card.memoryBytes - bare.scratchBytes - parts;
      return Math.floor(room / (layerBytes + kvBytes));
    },
  };
}

/** The rate at which a worker decodes the matrices of a layer. */
function layerBytesPerMs({ codegemm }: ModelConfig, { calibration }: WorkerCard): number {
  if (codegemm === null) return calibration.denseBytesPerMs;
  return codegemm.b > 8 ? calibration.wideCodeBytesPerMs : calibration.codegemmBytesPerMs;
}

function layerParts(config: ModelConfig): PartName[] {
  return Array.from({ length: config.layers }, (_, i): PartName => `layer.${i}`);
}

/** The larger of a part's size in the store and by its shapes on the GPU. */
function bytesOf(
  stored: ReadonlyMap<PartName, number>,
  config: ModelConfig,
  part: PartName,
): number {
  return Math.max(stored.get(part) ?? 0, partBytes(config, part));
}

function planStagesOf(
  request: PlanRequest,
  { limits, candidates, placement }: Found,
): PlanStage[] {
  let from = 0;
  return placement.map((share) => {
    const { card } = request.workers[share.worker];
    const range = { from, to: from + share.layers, first: share.first, last: share.last };
    from = range.to;
    const { kvBytes, scratchBytes } = stageFootprint(request.config, range, limits);
    return {
      ...range,
      worker: card.worker,
      instance: card.instance,
      weightBytes: weightBytes(request, range),
      kvBytes,
      scratchBytes,
      predictedMs: candidates[share.worker].stageMs(share.layers, share),
    };
  });
}

function weightBytes(request: PlanRequest, range: Ends & { from: number; to: number }): number {
  const { config, partBytes: stored } = request;
  const parts = layerParts(config).slice(range.from, range.to);
  if (range.first) parts.push("embedding");
  if (range.last) parts.push("head");
  return parts.reduce((sum, part) => sum + bytesOf(stored, config, part), 0);
}

// ── Words ─────────────────────────────────────────────────────────────────────────────────────

function explain(request: PlanRequest, found: Found): string[] {
  const { placement } = found;
  const stages = planStagesOf(request, found);
  const placed = stages.map((stage, index) => {
    const { card } = request.workers[placement[index].worker];
    const bytes = stage.weightBytes + stage.kvBytes + stage.scratchBytes;
    return `${stage.worker} (${card.gpu.name}) holds ${describe(stage)}: ${gib(bytes)} of ` +
      `${gib(card.memoryBytes)}, ${stage.predictedMs.toFixed(2)} ms a token`;
  });
  const used = new Set(placement.map(({ worker }) => worker));
  const left = request.workers.flatMap(({ card }, index) =>
    used.has(index) ? [] : [
      `${card.worker} (${card.gpu.name}) is left out: ${whyLeftOut(request, found, index)}`,
    ]
  );
  return [...placed, ...left];
}

function describe(stage: PlanStage): string {
  const count = stage.to - stage.from;
  const layers = count === 1 ? `layer ${stage.from}` : `layers ${stage.from} to ${stage.to - 1}`;
  const ends = [stage.first ? "the embedding" : "", stage.last ? "the output head" : ""];
  const parts = [layers, ...ends.filter(Boolean)];
  return parts.length === 1 ? parts[0] : `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}`;
}

function whyLeftOut(
  request: PlanRequest,
  { limits, candidates, placement }: Found,
  index: number,
): string {
  const { card } = request.workers[index], candidate = candidates[index];
  const ends: Ends = { first: false, last: false };
  if (limits.pages * kvBindingBytesPerPage(request.config) > card.maxBindingBytes) {
    return `its largest binding, ${gib(card.maxBindingBytes)}, cannot hold the KV pages of a layer`;
  }
  if (candidate.capacity(ends) < 1) {
    return `${gib(card.memoryBytes)} cannot hold one layer with its KV pages`;
  }
  if (request.objective === "spread" && placement.length >= request.config.layers) {
    return `the model has only ${request.config.layers} layers`;
  }
  if (placement.length === request.stages) return `${request.stages} stages were asked for`;
  const hop = `its hops alone would add ${candidate.hopMs.toFixed(2)} ms to a token`;
  if (request.objective === "latency") return `it would slow the rest; ${hop}`;
  return `the slowest stage stays at ${
    bottleneckMs(candidates, placement).toFixed(2)
  } ms with it or without; ${hop}`;
}

function doesNotFit(request: PlanRequest, limits: StageLimits): FleetError {
  const { config, workers } = request;
  const free = workers.reduce((sum, { card }) => sum + card.memoryBytes, 0);
  const whole = { from: 0, to: config.layers, first: true, last: true };
  const { kvBytes, scratchBytes } = stageFootprint(config, whole, limits);
  const needed = weightBytes(request, whole) + kvBytes + scratchBytes;
  const advice = config.codegemm
    ? "add a worker, or serve a shorter context"
    : "add a worker, or quantize with --format m1v4g128";
  const on = `${workers.length} worker${workers.length === 1 ? "" : "s"}`;
  if (needed > free) {
    return new FleetError(
      "out-of-memory",
      `Cannot place the model: ${gib(needed)} needed, ${gib(free)} free on ${on}; ${advice}`,
    );
  }
  return new FleetError(
    "out-of-memory",
    `Cannot place the model: ${gib(needed)} needed, and the ${gib(free)} free on ${on} ` +
      `do not divide into whole layers with each stage's scratch of ${
        gib(scratchBytes)
      }; ${advice}`,
  );
}

function gib(bytes: number): string {
  const size = bytes / 2 ** 30;
  return size >= 0.1 || bytes === 0
    ? `${size.toFixed(1)} GiB`
    : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}
