/**
 * A model on a GPU: weights by part, stages that run steps, and a chain of stages for evaluation.
 *
 * @module
 */
export { type Perplexity, perplexity, type PerplexityOptions } from "./perplexity.ts";
export { perplexityLimits } from "./perplexity.ts";
export { type ChainOptions, type ChainRow, type RequestKind } from "./stage_chain.ts";
export { StageChain, stepBatch } from "./stage_chain.ts";
export { StageModel } from "./stage_model.ts";
export type { StageOutput, StageProgress, StageSpec, StageSteps, Ticket } from "./stage_spec.ts";
export { tuneStage, type TuningMemory } from "./tuning.ts";
export { warmUp } from "./warm_up.ts";
export { type MatrixSource, WeightStore } from "./weights.ts";
