/**
 * All stages of a model on one GPU, one behind the other, without a fleet around them: for
 * evaluation and tests.
 *
 * @module
 */
import type { RowRequest, RowResult, StepBatch } from "../shared/frames.ts";
import type { ModelConfig, TensorSource } from "../shared/model_config.ts";
import { stageParts } from "../shared/model_config.ts";
import type { NumericsProfile, StageLimits } from "../shared/protocol.ts";
import type { Gpu } from "../kernels/gpu.ts";
import { StageModel } from "./stage_model.ts";
import type { StageSpec } from "./stage_spec.ts";
import { WeightStore } from "./weights.ts";

/** A row of a step: a token at a position of a sequence, and what it is asked for. */
export interface ChainRow {
  /** Index into the pages given to {@linkcode stepBatch}. */
  sequence: number;
  position: number;
  token: number;
  request?: RequestKind;
}

/** A {@linkcode RowRequest} without its row. */
export type RequestKind = RowRequest extends infer R ? R extends RowRequest ? Omit<R, "row"> : never
  : never;

/** A step of these rows, in this order; the first `decodeRows` are decode rows. */
export function stepBatch(
  pages: readonly Uint32Array[],
  rows: readonly ChainRow[],
  decodeRows: number,
): StepBatch {
  const requests: RowRequest[] = [];
  rows.forEach(({ request }, row) => {
    if (request) requests.push({ ...request, row } as RowRequest);
  });
  return {
    sequences: pages.map((table) => ({ pages: table })),
    rowSequence: Uint16Array.from(rows, (row) => row.sequence),
    rowPosition: Uint32Array.from(rows, (row) => row.position),
    rowToken: Uint32Array.from(rows, (row) => row.token),
    decodeRows,
    requests,
  };
}

/** What a {@linkcode StageChain} is made of. */
export interface ChainOptions {
  gpu: Gpu;
  config: ModelConfig;
  tensors: TensorSource;
  limits: StageLimits;
  /** Layers where a new stage begins: `[3]` makes two stages. */
  cuts?: readonly number[];
  profile?: NumericsProfile;
  variants?: StageSpec["variants"];
}

/** The answers of a step. */
export interface ChainOutput {
  results: RowResult[];
  /** What each stage but the last passed on. */
  hidden: Uint16Array<ArrayBuffer>[];
}

/** All stages of a model on one GPU, one behind the other. */
export class StageChain {
  readonly #stages: StageModel[];
  readonly #weights: WeightStore;

  private constructor(stages: StageModel[], weights: WeightStore) {
    this.#stages = stages;
    this.#weights = weights;
  }

  /** Loads every part, and makes the stages. */
  static async load(options: ChainOptions): Promise<StageChain> {
    const { gpu, config, tensors, limits, variants } = options;
    const profile = options.profile ?? { version: 1, decode: "codegemm" };
    const bounds = [0, ...(options.cuts ?? []), config.layers];
    const weights = new WeightStore(gpu);
    const stages: StageModel[] = [];
    for (let i = 0; i + 1 < bounds.length; i++) {
      const [from, to] = [bounds[i], bounds[i + 1]];
      const span = { from, to, first: from === 0, last: to === config.layers };
      for (const part of stageParts(span)) await weights.load(config, part, tensors);
      const spec = { config, ...span, limits, profile, variants };
      stages.push(await StageModel.load(gpu, spec, weights));
    }
    return new StageChain(stages, weights);
  }

  /**
   * Passes a step through all stages.
   *
   * @throws FleetError as {@linkcode StageModel}'s `submit` and `finish` do
   */
  async step(batch: StepBatch): Promise<ChainOutput> {
    const hidden: Uint16Array<ArrayBuffer>[] = [];
    for (const stage of this.#stages) {
      const output = await stage.finish(stage.submit(batch, hidden.at(-1) ?? null));
      if (output.hidden === null) return { results: output.results, hidden };
      hidden.push(output.hidden);
    }
    throw new Error("the last stage of a chain answers");
  }

  destroy(): void {
    this.#stages.forEach((stage) => stage.destroy());
    this.#weights.destroy();
  }
}
