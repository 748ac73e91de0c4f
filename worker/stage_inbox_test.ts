import { assert, assertEquals } from "@std/assert";
import type { FrameOrder } from "../shared/frames.ts";
import { type Random, randomInt, seededRandom } from "../shared/random.ts";
import {
  type Decision,
  judgeFrame,
  judgeSubject,
  openInbox,
  type StageInbox,
} from "./stage_inbox.ts";

const EPOCH = 3;

function order(attempt: number, attemptBase: number, step: number, epoch = EPOCH): FrameOrder {
  return { epoch, attempt, attemptBase, step };
}

/** Feeds frames one after the other; says of each what became of it. */
function feed(frames: FrameOrder[], room = true, start = openInbox(EPOCH, "a")) {
  let inbox: StageInbox = start;
  const decisions: Decision[] = [];
  for (const frame of frames) {
    const judged = judgeFrame(Object.freeze(inbox), frame, room);
    inbox = judged.inbox;
    decisions.push(judged.decision);
  }
  const words = decisions.map((d) => d.type === "apply" ? "apply" : d.reason);
  return { inbox, decisions, words };
}

Deno.test("judgeSubject() lets through only the predecessor's frames of this epoch", () => {
  const inbox = openInbox(EPOCH, "a");
  assertEquals(judgeSubject(inbox, "a", EPOCH), null);
  assertEquals(judgeSubject(inbox, "b", EPOCH), "wrong-sender");
  assertEquals(judgeSubject(inbox, "a", EPOCH - 1), "old-epoch");
  assertEquals(judgeSubject(inbox, "a", EPOCH + 1), "future-epoch");
  assertEquals(judgeSubject(inbox, "a", NaN), "malformed");
});

Deno.test("judgeFrame() applies steps in order, each once", () => {
  const { words } = feed([order(1, 1, 1), order(1, 1, 2), order(1, 1, 2), order(1, 1, 1)]);
  assertEquals(words, ["apply", "apply", "doubled", "doubled"]);
});

Deno.test("judgeFrame() reports a gap at once, and once per attempt and expected step", () => {
  const { decisions, words } = feed([
    order(1, 1, 1),
    order(1, 1, 3),
    order(1, 1, 4),
    order(2, 2, 3),
    order(2, 2, 4),
    order(2, 2, 2),
    order(2, 2, 4),
  ]);
  assertEquals(words, ["apply", "gap", "gap", "gap", "gap", "apply", "gap"]);
  assertEquals(decisions.map((d) => d.type === "drop" ? d.gap : null), [
    null,
    { attempt: 1, expected: 2, got: 3 },
    null,
    { attempt: 2, expected: 2, got: 3 },
    null,
    null,
    { attempt: 2, expected: 3, got: 4 },
  ]);
});

Deno.test("judgeFrame() starts over at the base of a higher attempt and drops the lower one", () => {
  const { decisions, words } = feed([
    order(1, 1, 1),
    order(1, 1, 2),
    order(1, 1, 3),
    order(2, 2, 2),
    order(1, 1, 4),
    order(2, 2, 3),
    order(2, 2, 4),
  ]);
  assertEquals(words, ["apply", "apply", "apply", "apply", "old-attempt", "apply", "apply"]);
  assertEquals(decisions.map((d) => d.supersedes), [true, false, false, true, false, false, false]);
});

Deno.test("judgeFrame() drops what a coordinator in its right mind cannot have sent", () => {
  const start = feed([order(1, 1, 1), order(1, 1, 2), order(2, 2, 2)]).inbox;
  const one = (frame: FrameOrder) => feed([frame], true, start);
  const impossible = {
    "another base in the same attempt": order(2, 3, 3),
    "a step before its attempt's base": order(3, 3, 2),
    "a base that moved back": order(3, 1, 1),
    "a base past what was applied": order(3, 4, 4),
  };
  for (const [what, frame] of Object.entries(impossible)) {
    const { words, inbox } = one(frame);
    assertEquals(words, ["bad-order"], what);
    assertEquals(inbox, start, what);
  }
  assertEquals(one(order(2, 2, 3, EPOCH + 1)).words, ["malformed"]);
  assertEquals(one(order(3, 3, 3)).words, ["apply"]);
});

Deno.test("judgeFrame() without room drops the step, says so once, and takes it later", () => {
  const full = feed([order(1, 1, 1), order(1, 1, 2)], false);
  assertEquals(full.words, ["queue-full", "gap"]);
  assertEquals(full.decisions.map((d) => d.type === "drop" && d.gap !== null), [true, false]);
  assertEquals(feed([order(2, 1, 1)], true, full.inbox).words, ["apply"]);
});

/**
 * A coordinator that issues, finishes and reissues steps, over a wire that loses, doubles and delays.
 *
 * @param frontier one past the highest step that the stage applied: no other can be finished
 */
function* hostileWire(random: Random, frontier: () => number): Generator<FrameOrder> {
  let attempt = 1, base = 1, next = 1;
  let delayed: FrameOrder[] = [];
  for (let event = 0; event < 300; event++) {
    const dice = random();
    if (dice < 0.05) {
      yield order(attempt, base, next, EPOCH + (random() < 0.5 ? -1 : 1));
    } else if (dice < 0.15 && next > base) {
      attempt++;
      base += randomInt(random, Math.min(next, frontier()) - base + 1);
      for (let step = base; step < next; step++) {
        if (random() < 0.9) yield order(attempt, base, step);
      }
    } else if (dice < 0.3 && delayed.length > 0) {
      yield* delayed;
      delayed = [];
    } else {
      const frame = order(attempt, base, next++);
      const fate = random();
      if (fate < 0.7) yield frame;
      else if (fate < 0.8) yield* [frame, frame];
      else if (fate < 0.9) delayed.push(frame);
    }
  }
}

Deno.test("judgeFrame() holds its promises on 200 hostile wires", () => {
  for (let seed = 0; seed < 200; seed++) {
    let inbox = openInbox(EPOCH, "a");
    let applied = 0;
    let last = { attempt: 0, step: 0 };
    const gaps = new Set<string>();
    for (const frame of hostileWire(seededRandom(seed), () => inbox.frontier)) {
      const before = inbox;
      const judged = judgeFrame(Object.freeze(inbox), frame, true);
      inbox = judged.inbox;
      const { decision } = judged;
      assert(inbox.attempt >= before.attempt && inbox.frontier >= before.frontier, `seed ${seed}`);
      if (decision.type === "drop") {
        if (!decision.supersedes) assertEquals(inbox.expected, before.expected);
        if (decision.gap) {
          const key = `${decision.gap.attempt}/${decision.gap.expected}`;
          assert(!gaps.has(key), `seed ${seed}: the gap ${key} was told twice`);
          gaps.add(key);
        }
        continue;
      }
      assertEquals(frame.epoch, EPOCH);
      const next = frame.attempt === last.attempt ? last.step + 1 : frame.attemptBase;
      assert(frame.attempt >= last.attempt, `seed ${seed}: an old attempt was applied`);
      assertEquals(frame.step, next, `seed ${seed}: not the next step of its attempt`);
      assert(frame.step <= before.frontier, `seed ${seed}: a step was skipped`);
      last = { attempt: frame.attempt, step: frame.step };
      applied++;
    }
    assert(applied >= 20, `seed ${seed}: only ${applied} steps were applied`);
    // Whatever happened before, an attempt that arrives whole is applied whole.
    const from = inbox.attemptBase;
    const clean = [0, 1, 2].map((i) => order(inbox.attempt + 1, from, from + i));
    assertEquals(feed(clean, true, inbox).words, ["apply", "apply", "apply"], `seed ${seed}`);
  }
});
