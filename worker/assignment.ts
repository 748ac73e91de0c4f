/**
 * Whether a worker takes an assignment. Pure: what it is and what it was asked, in; a verdict, out.
 *
 * @module
 */
import { parseModelConfig } from "../shared/checkpoint/mod.ts";
import { toFleetError } from "../shared/errors.ts";
import { type ModelConfig, stageParts } from "../shared/model_config.ts";
import { type AssignStage, PROTOCOL_VERSION } from "../shared/protocol.ts";

/** What an assignment comes to. */
export type Verdict =
  | { type: "accept"; config: ModelConfig }
  /** The worker loads or serves this epoch already: the answer to an earlier request was lost. */
  | { type: "known" }
  | { type: "refuse"; reason: string };

/**
 * @param self the highest epoch this process was ever assigned (0 for none), and whether that one is
 * loading or serving now
 */
export function judgeAssignment(
  self: { epoch: number; busy: boolean },
  assignment: AssignStage,
): Verdict {
  const { version, epoch, stage } = assignment;
  if (version !== PROTOCOL_VERSION) {
    return refuse(
      `This worker speaks protocol ${PROTOCOL_VERSION}, the coordinator ${version}; ` +
        "run the same release on both",
    );
  }
  if (epoch === self.epoch && self.busy) return { type: "known" };
  if (epoch <= self.epoch) {
    return refuse(`Epoch ${epoch} is not newer than ${self.epoch}, which this worker was assigned`);
  }
  let config: ModelConfig;
  try {
    config = parseModelConfig(assignment.config);
  } catch (error) {
    return refuse(`The model's configuration: ${toFleetError(error).message}`);
  }
  const { index, stages, from, to, first, last } = stage;
  if (from >= to || to > config.layers) {
    return refuse(`The model has ${config.layers} layers, the stage wants ${from} to ${to - 1}`);
  }
  const ends = first === (index === 0) && first === (from === 0) &&
    last === (index === stages - 1) && last === (to === config.layers);
  if (!ends || index >= stages) {
    return refuse(`Stage ${index} of ${stages} cannot hold layers ${from} to ${to - 1}`);
  }
  const wanted = stageParts(stage).join(", "), named = assignment.parts.map(({ part }) => part);
  if (wanted !== named.join(", ")) {
    return refuse(`The stage consists of ${wanted}, the assignment names ${named.join(", ")}`);
  }
  return { type: "accept", config };
}

function refuse(reason: string): Verdict {
  return { type: "refuse", reason };
}
