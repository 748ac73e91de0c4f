/**
 * The fleet as a text: a snapshot in, lines out. Pure.
 *
 * @module
 */
import type { FleetSnapshot, StageSnapshot, WorkerSnapshot } from "../coordinator/snapshot.ts";
import {
  ago,
  bytes,
  count,
  droppedFrames,
  layers,
  modelLine,
  ms,
  percent,
  plural,
  rate,
} from "../coordinator/monitor/format.js";

/** How to draw. */
export interface ViewOptions {
  /** Characters of a line at most. */
  columns: number;
  /** Lines at most; the events give way first. */
  rows: number;
  color: boolean;
}

const LEVEL_MARKS = { info: " ", warning: "!", error: "x" } as const;
const STATE_COLORS: Record<string, number> = { serving: 32, loading: 33, waiting: 33, failed: 31 };

const HEADINGS = [
  "stage",
  "worker",
  "holds",
  "p50",
  "wire",
  "queue",
  "gpu",
  "readback",
  "p95",
  "p99",
  "predicted",
  "busy",
  "memory",
];
/** Columns of words; figures stand to the right. */
const WORDS = 3;

/** The whole picture. Names from the fleet cannot steer the terminal. */
export function monitorView(snapshot: FleetSnapshot, options: ViewOptions): string {
  const { model, plan, workers } = snapshot;
  const paint = (code: number, text: string) =>
    options.color ? `\x1b[${code}m${text}\x1b[0m` : text;
  const fit = (line: string) => clip(printable(line), options.columns);
  const lines = [
    paint(1, fit(modelLine(model))),
    paint(STATE_COLORS[snapshot.state], fit(`${snapshot.state}: ${snapshot.note}`)),
    fit(loadLine(snapshot)),
  ];
  if (plan) {
    lines.push(fit(planLine(plan)), "");
    const table = stageTable(plan.stages, workers);
    lines.push(...table.map((line, at) => at === 0 ? paint(2, fit(line)) : fit(line)));
  }
  const placed = new Set(plan?.stages.map(({ worker }) => worker));
  const spares = workers.filter(({ worker }) => !placed.has(worker));
  if (spares.length > 0) {
    lines.push("", paint(2, fit("without a stage")), ...spares.map(spare).map(fit));
  }
  const room = options.rows - lines.length - 2;
  const events = snapshot.events.slice(0, Math.max(0, room)).map(({ atUnixMs, level, text }) =>
    fit(`${LEVEL_MARKS[level]} ${ago(snapshot.nowUnixMs - atUnixMs).padStart(10)}  ${text}`)
  );
  if (events.length > 0) lines.push("", paint(2, fit("what happened")), ...events);
  return lines.slice(0, options.rows).join("\n");
}

function loadLine(snapshot: FleetSnapshot): string {
  const { load } = snapshot;
  return [
    `${rate(load.tokensPerSecond)} tokens/s`,
    `${count(load.running)} running`,
    `${count(load.waiting)} waiting`,
    `KV pages ${count(load.pagesUsed)}/${count(load.pages)}`,
    `${count(load.stepsInFlight)} steps in flight`,
    `${count(load.tokensTotal)} tokens and ${count(load.sequencesTotal)} sequences so far`,
    `${count(load.preemptionsTotal)} preemptions`,
    `${count(load.reissuesTotal)} reissues`,
    `${plural(droppedFrames(snapshot), "frame")} dropped`,
  ].join(" · ");
}

function planLine(plan: NonNullable<FleetSnapshot["plan"]>): string {
  return `epoch ${plan.epoch}, attempt ${plan.attempt} · a token ${ms(plan.measuredTokenMs)} ` +
    `(predicted ${ms(plan.predictedTokenMs)}) · ` +
    `predicted ${rate(plan.predictedTokensPerSecond)} tokens/s when full`;
}

function stageTable(stages: StageSnapshot[], workers: WorkerSnapshot[]): string[] {
  const rows = stages.map((stage) =>
    stageRow(stage, workers.find(({ worker }) => worker === stage.worker))
  );
  const widths = HEADINGS.map((heading, column) =>
    Math.max(heading.length, ...rows.map((row) => row[column].length))
  );
  return [HEADINGS, ...rows].map((row) =>
    row.map((cell, column) =>
      column < WORDS ? cell.padEnd(widths[column]) : cell.padStart(widths[column])
    ).join("  ").trimEnd()
  );
}

function stageRow(stage: StageSnapshot, worker: WorkerSnapshot | undefined): string[] {
  const { latency } = stage;
  const loading = worker?.progress;
  return [
    String(stage.index),
    printable(stage.worker),
    layers(stage),
    ms(latency?.total.p50),
    ms(latency?.wire.p50),
    ms(latency?.queue.p50),
    ms(latency?.gpu.p50),
    ms(latency?.readback.p50),
    ms(latency?.total.p95),
    ms(latency?.total.p99),
    ms(stage.predictedMs),
    loading
      ? `loads ${percent(loading.totalBytes > 0 ? loading.doneBytes / loading.totalBytes : 0)}`
      : worker && worker.state !== "serving"
      ? worker.state
      : percent(stage.busy),
    worker ? `${bytes(worker.usedBytes)}/${bytes(worker.memoryBytes)}` : "gone",
  ];
}

function spare({ worker, state, gpu, memoryBytes, note }: WorkerSnapshot): string {
  return `${worker} (${state}, ${gpu}, ${bytes(memoryBytes)}): ${note}`;
}

/** Without control characters. */
function printable(text: string): string {
  return text.replace(/\p{Cc}/gu, "?");
}

function clip(line: string, columns: number): string {
  const characters = [...line];
  return characters.length <= columns ? line : `${characters.slice(0, columns - 1).join("")}…`;
}
