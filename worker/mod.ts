/**
 * Workers: a stage on a bus, the control around it, and stages of real models on this thread's GPU.
 * The process (`main.ts`) and its threads stand apart: nothing here needs more than a web platform.
 *
 * @module
 */
export {
  createStage,
  type DropCounts,
  type RunnerOutput,
  type Stage,
  type StageOptions,
  type StageRunner,
} from "./stage.ts";
export {
  type Decision,
  type DropReason,
  type Gap,
  judgeFrame,
  judgeSubject,
  openInbox,
  type StageInbox,
} from "./stage_inbox.ts";
export {
  FleetWorker,
  type LoadedStage,
  type LoadNote,
  type PartOrigin,
  type PartProgress,
  type PartProvider,
  type StageLoader,
  type WorkerOptions,
} from "./worker.ts";
export { ModelLoader, modelRunner, type ReadablePart } from "./model_loader.ts";
