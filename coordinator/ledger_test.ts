import { assert, assertEquals } from "@std/assert";
import { Ledger } from "./ledger.ts";

function reissued(ledger: Ledger<string>, nowMs: number) {
  const reissue = ledger.raise(nowMs);
  assert(reissue.type === "reissue");
  return reissue.steps;
}

Deno.test("a step is issued under its epoch, attempt and number, and accepted once", () => {
  const ledger = new Ledger<string>(3);
  const order = ledger.issue(1, "one", 10);
  assertEquals(order, { epoch: 3, attempt: 1, attemptBase: 1, step: 1 });
  assertEquals(ledger.accept(order, 15), { type: "accepted", step: "one", latencyMs: 5 });
  assertEquals(ledger.accept(order, 16), { type: "duplicate" });
  assertEquals(ledger.size, 0);
});

Deno.test("an overtaking result shows a gap, and the new attempt begins at the oldest unfinished step", () => {
  const ledger = new Ledger<string>(3);
  const orders = ["one", "two", "three"].map((step, i) => ledger.issue(i + 1, step, 0));
  assertEquals(ledger.accept(orders[0], 5).type, "accepted");
  assertEquals(ledger.accept(orders[2], 6), { type: "gap" });
  assertEquals(reissued(ledger, 6), [
    { order: { epoch: 3, attempt: 2, attemptBase: 2, step: 2 }, step: "two" },
    { order: { epoch: 3, attempt: 2, attemptBase: 2, step: 3 }, step: "three" },
  ]);
  assertEquals(ledger.reissues, 2);
  assertEquals(ledger.issue(4, "four", 7), { epoch: 3, attempt: 2, attemptBase: 2, step: 4 });
});

Deno.test("a late result of an older attempt is right; one that overtakes raises nothing again", () => {
  const ledger = new Ledger<string>(3);
  const orders = ["one", "two"].map((step, i) => ledger.issue(i + 1, step, 0));
  reissued(ledger, 5);
  assertEquals(ledger.accept(orders[1], 6), { type: "early" });
  assertEquals(ledger.accept(orders[0], 7).type, "accepted");
  assertEquals(ledger.accept(orders[1], 8).type, "accepted");
  assertEquals(ledger.accept({ ...orders[0], attempt: 2 }, 9), { type: "duplicate" });
});

Deno.test("what was never issued is stale", () => {
  const ledger = new Ledger<string>(3);
  ledger.issue(1, "one", 0);
  reissued(ledger, 5);
  const order = ledger.issue(2, "two", 5);
  const verdicts = [
    { ...order, epoch: 2 },
    { ...order, step: 3 },
    { ...order, attempt: 3 },
    { ...order, attempt: 1 },
  ].map((wrong) => ledger.accept(wrong, 6).type);
  assertEquals(verdicts, ["stale", "stale", "stale", "stale"]);
});

Deno.test("a stage's gap counts only for the current attempt", () => {
  const ledger = new Ledger<string>(3);
  assertEquals(ledger.isCurrent({ epoch: 3, attempt: 1 }), false, "nothing is in flight");
  ledger.issue(1, "one", 0);
  assert(ledger.isCurrent({ epoch: 3, attempt: 1 }));
  assertEquals(ledger.isCurrent({ epoch: 2, attempt: 1 }), false);
  reissued(ledger, 1);
  assertEquals(ledger.isCurrent({ epoch: 3, attempt: 1 }), false);
});

Deno.test("the deadline runs from the last progress, grows with latency and doubles without progress", () => {
  const ledger = new Ledger<string>(3, { stepDeadlineMs: 100 });
  assertEquals(ledger.deadlineMs, null);
  const first = ledger.issue(1, "one", 0);
  const second = ledger.issue(2, "two", 10);
  assertEquals(ledger.deadlineMs, 100);
  ledger.accept(first, 80);
  assertEquals(ledger.deadlineMs, 80 + 4 * 80);
  assertEquals([ledger.expired(399), ledger.expired(400)], [false, true]);
  reissued(ledger, 400);
  assertEquals(ledger.deadlineMs, 400 + 2 * 4 * 80);
  ledger.accept(second, 500);
  assertEquals(ledger.deadlineMs, null);
});

Deno.test("a step that never completes gives the pipeline up, one that waits behind others does not", () => {
  const ledger = new Ledger<string>(3, { maxAttempts: 3 });
  const steps = Array.from({ length: 5 }, (_, i) => ledger.issue(i + 1, `${i + 1}`, 0));
  for (const order of steps.slice(0, 4)) {
    reissued(ledger, 1);
    assertEquals(ledger.accept(order, 2).type, "accepted");
  }
  reissued(ledger, 3);
  reissued(ledger, 4);
  const given = ledger.raise(5);
  assert(given.type === "failed");
  assertEquals(given.error.code, "unavailable");
  assertEquals(given.error.message, "Step 5 brought no result in 3 attempts");
});

Deno.test("gaps are heard at once, then no sooner than a step needs, and ever less while nothing comes", () => {
  const ledger = new Ledger<number>(1);
  ledger.accept(ledger.issue(1, 1, 0), 50);
  assertEquals(ledger.gapHeardMs, -Infinity);
  const second = ledger.issue(2, 2, 50);
  ledger.raise(60);
  assertEquals(ledger.gapHeardMs, 160, "twice the usual latency");
  ledger.raise(160);
  assertEquals(ledger.gapHeardMs, 360);
  assertEquals(ledger.accept(second, 210).type, "accepted");
  assert(ledger.gapHeardMs < 360, "a step came through");
});
