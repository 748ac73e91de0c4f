/**
 * Kernel variants for the linear layers of a stage: tried once on this GPU for each shape of matrix,
 * remembered from then on.
 *
 * @module
 */
import { z } from "zod";
import type { Gpu } from "../kernels/gpu.ts";
import {
  BATCHES,
  CANDIDATES,
  type Matrix,
  tuneLinear,
  tuningKey,
  type Variant,
} from "../kernels/linear/mod.ts";
import type { PartName } from "../shared/model_config.ts";
import type { StageSpec } from "./stage_spec.ts";
import type { WeightStore } from "./weights.ts";

/** Where choices outlive the process. */
export interface TuningMemory {
  /** What was written last; null at first. */
  read(): Promise<string | null>;
  write(text: string): Promise<void>;
}

/** Chosen variants by `tuningKey`. */
type Choices = Map<string, Partial<Variant>>;

/**
 * Chooses the variants of a stage whose parts are in the store; tries on the GPU only what the memory
 * does not know.
 *
 * @returns what belongs into {@linkcode StageSpec}`.variants`
 * @throws FleetError `gpu`, `out-of-memory`
 */
export async function tuneStage(
  gpu: Gpu,
  spec: StageSpec,
  weights: WeightStore,
  memory: TuningMemory,
  onProgress?: (line: string) => void,
): Promise<StageSpec["variants"]> {
  if (!gpu.timestamps) return undefined;
  const { decode } = spec.profile;
  const choices = parseChoices(await memory.read());
  const byMatrix = new Map<Matrix, Partial<Variant>>();
  let tried = false;
  for (const matrices of alike(codedMatrices(spec, weights))) {
    const key = await tuningKey(gpu, matrices[0], decode);
    if (!choices.has(key)) {
      onProgress?.(`trying kernels of ${matrices[0].n} x ${matrices[0].k}`);
      choices.set(key, (await tuneLinear(gpu, matrices, decode)).variant);
      tried = true;
    }
    for (const matrix of matrices) byMatrix.set(matrix, choices.get(key)!);
  }
  if (tried) await memory.write(JSON.stringify(Object.fromEntries(choices), null, 2) + "\n");
  return (matrix) => byMatrix.get(matrix) ?? {};
}

/** Of all the memory says, the choices that could be made today. */
export function parseChoices(text: string | null): Choices {
  const choices: Choices = new Map();
  let stored: unknown;
  try {
    stored = JSON.parse(text ?? "{}");
  } catch {
    return choices; // Torn by a crash: tried again.
  }
  const entries = z.record(z.string(), z.unknown()).safeParse(stored);
  for (const [key, value] of Object.entries(entries.data ?? {})) {
    const choice = CHOICE.safeParse(value);
    if (choice.success) choices.set(key, choice.data);
  }
  return choices;
}

const POSSIBLE = new Map(CANDIDATES.map((choice) => [JSON.stringify(choice), choice]));
const CANDIDATE = z.unknown().transform((value) => POSSIBLE.get(JSON.stringify(value)))
  .refine((choice) => choice !== undefined);
const CHOICE = z.strictObject({
  // One row alone has a kernel wherever any has: without it a layer might be left with none.
  batches: z.array(z.literal(BATCHES)).refine((batches) => batches.includes(1)).optional(),
  byBatch: z.partialRecord(z.literal(BATCHES), CANDIDATE)
    .optional(),
});

function codedMatrices(spec: StageSpec, weights: WeightStore): Matrix[] {
  const matrices: Matrix[] = [];
  for (let i = spec.from; i < spec.to; i++) {
    const part: PartName = `layer.${i}`;
    const layer = weights.get(`layer.${i}`, spec.parts?.get(part) ?? part);
    const { queriesKeysValues, attentionOut, gateUp, down } = layer;
    matrices.push(...queriesKeysValues, attentionOut, ...gateUp, down);
  }
  return matrices.filter(({ format }) => format !== null);
}

/** Matrices that run the same code, together. */
function alike(matrices: readonly Matrix[]): Matrix[][] {
  const groups = Map.groupBy(
    matrices,
    ({ members, k, format }) => JSON.stringify([members, k, format]),
  );
  return [...groups.values()];
}
