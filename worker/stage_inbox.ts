/**
 * Which frames a stage applies: the rules that let core NATS lose, delay and double frames without
 * harm. Pure: a state and an arrival in, the next state and a decision out.
 *
 * A stage applies exactly the next step of the current attempt. A frame of a higher attempt moves the
 * expectation to that attempt's first step, whatever came before: the coordinator reissues every
 * unfinished step, unchanged and in order, and applying one again writes the same bits to the same
 * pages. Everything else is dropped and counted, and never touches a page.
 *
 * @module
 */
import type { FrameOrder } from "../shared/frames.ts";

/** What a stage remembers of the order of things. */
export interface StageInbox {
  readonly epoch: number;
  /** The only sender whose frames count: the stage before, or the coordinator. */
  readonly previous: string;
  /** 0 before the first frame. */
  readonly attempt: number;
  /** The first step of `attempt`. */
  readonly attemptBase: number;
  /** The one step that may be applied next. */
  readonly expected: number;
  /**
   * One past the highest step that was ever applied. No attempt begins beyond it: the steps between
   * would be finished without having passed here.
   */
  readonly frontier: number;
  /** The expected step that was reported missing in this attempt; 0 for none. */
  readonly reportedGap: number;
}

/** Why a frame was dropped. The worker's beats carry a count of each. */
export type DropReason =
  /** It does not decode, is no step, or contradicts its own subject. */
  | "malformed"
  /** A page, position, token or count beyond the stage's bounds. */
  | "out-of-bounds"
  /** Not from the stage before this one. */
  | "wrong-sender"
  | "old-epoch"
  | "future-epoch"
  | "old-attempt"
  /** A step of this attempt that was applied before. */
  | "doubled"
  /** A step before which another is missing. */
  | "gap"
  /** Attempt and base cannot belong together: a base that moved back, or past what was applied. */
  | "bad-order"
  /** The stage holds as many frames as it may. */
  | "queue-full"
  /** It waited for the GPU when a newer attempt came. */
  | "superseded"
  /** It came after the stage had failed. */
  | "failed";

/** A missing step, as {@linkcode WorkerReport} tells it. */
export interface Gap {
  attempt: number;
  expected: number;
  got: number;
}

/** What becomes of a frame. `supersedes`: frames of lower attempts that still wait are void. */
export type Decision =
  | { type: "apply"; supersedes: boolean }
  | { type: "drop"; reason: DropReason; supersedes: boolean; gap: Gap | null };

/** The state before the first frame of an epoch. */
export function openInbox(epoch: number, previous: string): StageInbox {
  return { epoch, previous, attempt: 0, attemptBase: 1, expected: 1, frontier: 1, reportedGap: 0 };
}

/**
 * What the subject alone says, so that nothing is decoded for a stranger.
 *
 * @param from the sender named in the subject
 * @param epoch the epoch named in the subject
 * @returns why the frame is dropped, or null when it must be looked into
 */
export function judgeSubject(inbox: StageInbox, from: string, epoch: number): DropReason | null {
  if (!Number.isInteger(epoch)) return "malformed";
  if (epoch < inbox.epoch) return "old-epoch";
  if (epoch > inbox.epoch) return "future-epoch";
  return from === inbox.previous ? null : "wrong-sender";
}

/**
 * What becomes of a frame that {@linkcode judgeSubject} let through.
 *
 * @param order where the frame says it stands
 * @param room whether the stage can hold one frame more
 *
 * @example A lost step is reported once, and a higher attempt starts over at its base.
 * ```ts
 * import { judgeFrame, openInbox } from "./stage_inbox.ts";
 * import { assertEquals } from "@std/assert";
 *
 * let inbox = openInbox(7, "coordinator");
 * const frame = (attempt: number, step: number) => {
 *   const order = { epoch: 7, attempt, attemptBase: 1, step };
 *   const judged = judgeFrame(inbox, order, true);
 *   inbox = judged.inbox;
 *   return judged.decision.type === "apply" ? "apply" : judged.decision.reason;
 * };
 * assertEquals([frame(1, 1), frame(1, 3), frame(2, 1), frame(2, 2)], ["apply", "gap", "apply", "apply"]);
 * ```
 */
export function judgeFrame(
  inbox: StageInbox,
  order: FrameOrder,
  room: boolean,
): { inbox: StageInbox; decision: Decision } {
  const { attempt, attemptBase, step } = order;
  if (order.epoch !== inbox.epoch) return dropped(inbox, "malformed");
  if (attempt < inbox.attempt) return dropped(inbox, "old-attempt");
  const supersedes = attempt > inbox.attempt;
  const possible = step >= attemptBase &&
    (supersedes
      ? attemptBase >= inbox.attemptBase && attemptBase <= inbox.frontier
      : attemptBase === inbox.attemptBase);
  if (!possible) return dropped(inbox, "bad-order");

  const current = supersedes
    ? { ...inbox, attempt, attemptBase, expected: attemptBase, reportedGap: 0 }
    : inbox;
  if (step < current.expected) return dropped(current, "doubled", supersedes);
  if (step > current.expected) return missing(current, "gap", step, supersedes);
  if (!room) return missing(current, "queue-full", step, supersedes);
  const expected = step + 1;
  return {
    inbox: { ...current, expected, frontier: Math.max(current.frontier, expected) },
    decision: { type: "apply", supersedes },
  };
}

function dropped(inbox: StageInbox, reason: DropReason, supersedes = false) {
  return { inbox, decision: { type: "drop", reason, supersedes, gap: null } as const };
}

/** A drop that leaves the expected step missing: told once per attempt and expected step. */
function missing(inbox: StageInbox, reason: DropReason, got: number, supersedes: boolean) {
  const { attempt, expected } = inbox;
  const gap = inbox.reportedGap === expected ? null : { attempt, expected, got };
  return {
    inbox: { ...inbox, reportedGap: expected },
    decision: { type: "drop", reason, supersedes, gap } as const,
  };
}
