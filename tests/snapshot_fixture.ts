/**
 * Snapshots for tests of what shows them: a 70B model on a small fleet whose figures agree with each
 * other (percentiles rise, parts add up, memory fits), drawn from a seed.
 *
 * @module
 */
import type {
  FleetSnapshot,
  Percentiles,
  StageLatency,
  StageSnapshot,
  WorkerSnapshot,
} from "../coordinator/snapshot.ts";
import { type Random, seededRandom } from "../shared/random.ts";

const GIB = 2 ** 30;
const LAYERS = 80;
const LAYER_BYTES = 227e6;
const HEAD_BYTES = 2.1e9;

/** What a fixture looks like; all else follows. */
export interface FixtureOptions {
  seed?: number;
  stages?: number;
  /** Workers without a stage. */
  spares?: number;
  state?: FleetSnapshot["state"];
  nowUnixMs?: number;
}

/** A fleet as a coordinator would draw it. */
export function snapshotFixture(options: FixtureOptions = {}): FleetSnapshot {
  const { seed = 1, stages: count = 4, spares = 1, state = "serving" } = options;
  const nowUnixMs = options.nowUnixMs ?? Date.UTC(2026, 10, 22, 12);
  const random = seededRandom(seed);
  const planned = state === "serving" || state === "loading";
  const measured = state === "serving";
  const stages = planned ? stagesOf(count, random, measured) : [];
  const workers = [
    ...stages.map((stage) => workerOf(stage, state, random)),
    ...Array.from({ length: planned ? spares : 0 }, (_, at) => spareWorker(at)),
  ];
  const sum = (of: (stage: StageSnapshot) => number) =>
    stages.reduce((total, stage) => total + of(stage), 0);
  const rate = measured ? 38 + 4 * random() : 0;
  return {
    model: {
      id: "llama-3-70b-m1v4g128",
      layers: LAYERS,
      bytes: 22.4e9,
      format: "m1v4g128",
      decode: "dequantize",
    },
    nowUnixMs,
    state,
    note: {
      waiting: "Waiting for workers: 22.4 GB are needed, 0 GB offered",
      loading: `Weights are on their way to ${count} workers`,
      serving: `${count} stages serve`,
      failed: "No plan fits: 22.4 GB needed, 16.0 GB free on 1 worker; add a worker",
    }[state],
    plan: planned
      ? {
        epoch: 7,
        attempt: 1,
        stages,
        predictedTokenMs: sum((stage) => stage.predictedMs),
        measuredTokenMs: measured ? sum((stage) => stage.latency?.total.p50 ?? 0) : null,
        predictedTokensPerSecond: 44.1,
        explanation: stages.map((stage) =>
          `${stage.worker}: layers ${stage.from} to ${stage.to - 1}, for its measured speed`
        ),
      }
      : null,
    workers,
    load: {
      running: measured ? 6 : 0,
      waiting: measured ? 2 : 0,
      pagesUsed: measured ? 311 : 0,
      pages: planned ? 1024 : 0,
      stepsInFlight: measured ? count : 0,
      tokensPerSecond: rate,
      tokensTotal: measured ? 48_211 : 0,
      sequencesTotal: measured ? 377 : 0,
      preemptionsTotal: measured ? 1 : 0,
      reissuesTotal: measured ? 2 : 0,
    },
    dropped: measured ? { duplicate: 3 } : {},
    events: [
      { atUnixMs: nowUnixMs - 4_000, level: "info", text: `Epoch 7 over ${count} workers` },
      { atUnixMs: nowUnixMs - 9_000, level: "warning", text: "A frame was lost; attempt 2" },
      { atUnixMs: nowUnixMs - 75_000, level: "error", text: "gpu-9 was lost: no beat for 700 ms" },
    ],
  };
}

function stagesOf(count: number, random: Random, measured: boolean): StageSnapshot[] {
  const border = (index: number) => Math.round(index * LAYERS / count);
  return Array.from({ length: count }, (_, index) => {
    const from = border(index), to = border(index + 1);
    const gpuMs = (to - from) * 0.15 * (0.9 + 0.3 * random());
    return {
      index,
      worker: `gpu-${index}`,
      from,
      to,
      first: index === 0,
      last: index === count - 1,
      latency: measured ? latencyOf(gpuMs, random) : null,
      predictedMs: (to - from) * 0.15 + 0.4,
      busy: measured ? 0.6 + 0.35 * random() : null,
    };
  });
}

function latencyOf(gpuMs: number, random: Random): StageLatency {
  const part = (p50: number): Percentiles => ({
    p50,
    p95: p50 * (1.2 + 0.3 * random()),
    p99: p50 * (1.6 + 0.6 * random()),
  });
  const parts = {
    wire: part(0.25 + 0.1 * random()),
    queue: part(0.3 + 0.5 * random()),
    gpu: part(gpuMs),
    readback: part(0.12),
  };
  const total = (key: keyof Percentiles) =>
    parts.wire[key] + parts.queue[key] + parts.gpu[key] + parts.readback[key];
  return {
    ...parts,
    total: { p50: total("p50"), p95: total("p95"), p99: total("p99") },
    samples: 480,
  };
}

function workerOf(
  { index, worker, from, to, first, last }: StageSnapshot,
  state: FleetSnapshot["state"],
  random: Random,
): WorkerSnapshot {
  const weights = (to - from) * LAYER_BYTES + (first ? HEAD_BYTES : 0) + (last ? HEAD_BYTES : 0);
  const totalBytes = weights;
  return {
    worker,
    host: `node-${index}.example`,
    gpu: index % 2 ? "NVIDIA GeForce RTX 4090" : "AMD Radeon RX 7900 XTX",
    software: false,
    memoryBytes: Math.max(22 * GIB, (weights + 3 * GIB) * 1.1),
    usedBytes: weights + 3 * GIB,
    state: state === "loading" ? "loading" : "serving",
    beatAgeMs: Math.floor(100 * random()),
    roundTripMs: 0.3 + 0.2 * random(),
    note: state === "loading" ? "loads its layers" : "serves its layers",
    progress: state === "loading"
      ? { doneBytes: totalBytes * (0.2 + 0.6 * random()), totalBytes }
      : null,
    dropped: index === 0 ? { "old-epoch": 2 } : {},
  };
}

function spareWorker(at: number): WorkerSnapshot {
  return {
    worker: `spare-${at}`,
    host: `desk-${at}.example`,
    gpu: "Intel Arc A380",
    software: false,
    memoryBytes: 6 * GIB,
    usedBytes: 0,
    state: "idle",
    beatAgeMs: 40,
    roundTripMs: 2.1,
    note: "Left out: with 3 layers it would make every token 4 ms slower",
    progress: null,
    dropped: {},
  };
}
