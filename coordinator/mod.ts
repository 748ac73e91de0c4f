/**
 * The coordinator: the fleet's loop over pure parts (membership, planner, scheduler, ledger), and the
 * API in front of it.
 *
 * @module
 */
export { type ApiContext, createApi } from "./api/mod.ts";
export type { Engine, GenerateEvent, GenerateRequest, Readiness, TokenLogprob } from "./engine.ts";
export { Fleet, type FleetModel, type FleetOptions } from "./fleet.ts";
export { KvAllocator, pagesFor } from "./kv_allocator.ts";
export { Ledger } from "./ledger.ts";
export { Lease, type LeaseStore } from "./lease.ts";
export { Membership, type MembershipEvent } from "./membership.ts";
export { Metrics } from "./metrics.ts";
export { type Plan, type PlanRequest, planStages } from "./planner.ts";
export { Scheduler, type SchedulerConfig, type SchedulerEvent } from "./scheduler.ts";
export type { FleetSnapshot, StageSnapshot, WorkerSnapshot } from "./snapshot.ts";
