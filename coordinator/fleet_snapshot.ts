/**
 * The picture of the fleet, put together from what its parts know.
 *
 * @module
 */
import type { NumericsProfile } from "../shared/protocol.ts";
import type { LoadProgress } from "./assignment.ts";
import type { FleetModel } from "./fleet_options.ts";
import type { Member } from "./membership.ts";
import type { Pipeline } from "./pipeline.ts";
import type { Plan } from "./planner.ts";
import type { Roster } from "./roster.ts";
import type { SchedulerStats } from "./scheduler.ts";
import type { FleetEvent, FleetSnapshot, StageSnapshot, WorkerSnapshot } from "./snapshot.ts";

/** What a snapshot is made from. */
export interface SnapshotParts {
  nowMs: number;
  nowUnixMs: number;
  model: FleetModel;
  profile: NumericsProfile;
  state: FleetSnapshot["state"];
  note: string;
  roster: Roster;
  plan: { epoch: number; plan: Plan } | null;
  pipeline: Pipeline | null;
  progress: ReadonlyMap<string, LoadProgress>;
  load: {
    stats: SchedulerStats | null;
    preemptionsBefore: number;
    reissuesBefore: number;
    tokensPerSecond: number;
    tokensTotal: number;
    sequencesTotal: number;
  };
  dropped: Readonly<Record<string, number>>;
  events: FleetEvent[];
}

/** The fleet at this moment. */
export function fleetSnapshot(parts: SnapshotParts): FleetSnapshot {
  const { model, plan, pipeline, load } = parts;
  return {
    model: {
      id: model.id,
      layers: model.config.layers,
      bytes: model.parts.reduce((sum, { bytes }) => sum + bytes, 0),
      format: model.format,
      decode: model.config.codegemm && parts.profile.decode,
    },
    nowUnixMs: parts.nowUnixMs,
    state: parts.state,
    note: parts.note,
    plan: plan && {
      epoch: plan.epoch,
      attempt: pipeline?.attempt ?? 1,
      stages: plan.plan.stages.map((stage, index): StageSnapshot => ({
        index,
        worker: stage.worker,
        from: stage.from,
        to: stage.to,
        first: stage.first,
        last: stage.last,
        latency: pipeline?.latency.stage(index) ?? null,
        predictedMs: stage.predictedMs,
        busy: pipeline?.latency.busy(index, parts.nowUnixMs) ?? null,
      })),
      predictedTokenMs: plan.plan.predictedTokenMs,
      measuredTokenMs: pipeline?.latency.tokenMs() ?? null,
      predictedTokensPerSecond: plan.plan.predictedTokensPerSecond,
      explanation: plan.plan.explanation,
    },
    workers: parts.roster.members.map((member) => workerSnapshot(member, parts)),
    load: {
      running: load.stats?.running ?? 0,
      waiting: load.stats?.waiting ?? 0,
      pagesUsed: load.stats?.pagesUsed ?? 0,
      pages: load.stats?.pages ?? 0,
      stepsInFlight: load.stats?.stepsInFlight ?? 0,
      tokensPerSecond: load.tokensPerSecond,
      tokensTotal: load.tokensTotal,
      sequencesTotal: load.sequencesTotal,
      preemptionsTotal: load.preemptionsBefore + (load.stats?.preemptions ?? 0),
      reissuesTotal: load.reissuesBefore + (pipeline?.reissues ?? 0),
    },
    dropped: { ...parts.dropped },
    events: parts.events,
  };
}

function workerSnapshot(member: Member, parts: SnapshotParts): WorkerSnapshot {
  const { card, beat } = member;
  const stage = parts.plan?.plan.stages.find(({ worker }) => worker === card.worker);
  const excluded = parts.roster.exclusion(member);
  const progress = parts.progress.get(card.worker);
  const state = workerState(member, excluded !== null, stage !== undefined, parts);
  return {
    worker: card.worker,
    host: card.host,
    gpu: card.gpu.name,
    software: card.gpu.software,
    memoryBytes: card.memoryBytes,
    usedBytes: stage ? stage.weightBytes + stage.kvBytes + stage.scratchBytes : 0,
    state,
    beatAgeMs: Math.max(0, parts.nowMs - member.lastBeatAtMs),
    roundTripMs: parts.roster.roundTripMs(card.worker),
    note: (member.state === "alive" && excluded) || member.note || progress?.note ||
      idleNote(state, parts),
    progress: state === "loading" && progress
      ? { doneBytes: progress.doneBytes, totalBytes: progress.totalBytes }
      : null,
    dropped: beat?.dropped ?? {},
  };
}

function workerState(
  member: Member,
  excluded: boolean,
  hasStage: boolean,
  parts: SnapshotParts,
): WorkerSnapshot["state"] {
  if (member.state === "lost") return "lost";
  if (member.state === "refused" || excluded) return "failed";
  if (!hasStage) return "idle";
  return parts.pipeline ? "serving" : "loading";
}

function idleNote(state: WorkerSnapshot["state"], parts: SnapshotParts): string {
  if (state === "serving") return "serves its stage";
  if (state === "loading") return "gets its stage ready";
  if (state !== "idle") return "";
  return parts.plan ? "not in this plan" : `waits: ${parts.note}`;
}
