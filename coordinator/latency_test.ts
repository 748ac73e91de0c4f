import { assertAlmostEquals, assertEquals } from "@std/assert";
import type { StageTrace } from "../shared/frames.ts";
import { ClockOffset, PlanLatency } from "./latency.ts";

/** A stage's trace by its own clock, which runs `ahead` of ours. */
function trace(receivedAtMs: number, ahead: number): StageTrace {
  return {
    receivedAtMs: receivedAtMs + ahead,
    startedAtMs: receivedAtMs + 2 + ahead,
    gpuMs: 5,
    readbackMs: 1,
    sentAtMs: receivedAtMs + 10 + ahead,
  };
}

Deno.test("the wire's share is told from traces of clocks that do not agree", () => {
  const latency = new PlanLatency(2);
  // Issued at 100, 3 ms to stage 0, 10 ms there, 4 ms to stage 1, 10 ms there, 1 ms back.
  latency.add([trace(103, 5_000), trace(117, -70)], [5_000, -70], 100, 128, true);
  const [first, second] = [latency.stage(0), latency.stage(1)];
  assertEquals(first?.wire.p50, 3);
  assertEquals(second?.wire.p50, 4);
  assertEquals(first?.queue.p50, 2);
  assertEquals(second?.total.p50, 14);
  assertEquals(latency.tokenMs(), 28);
});

Deno.test("percentiles are nearest-rank over the last 512 steps", () => {
  const latency = new PlanLatency(1);
  for (let i = 1; i <= 1000; i++) {
    latency.add([{ ...trace(0, 0), gpuMs: i }], [0], 0, 10, false);
  }
  // 489 to 1000 are remembered.
  assertEquals(latency.stage(0)?.gpu, { p50: 744, p95: 975, p99: 995 });
  assertEquals(latency.stage(0)?.samples, 512);
  assertEquals(latency.tokenMs(), null);
});

Deno.test("busy is the GPU's share of the last five seconds", () => {
  const latency = new PlanLatency(1);
  for (let atMs = 0; atMs < 20_000; atMs += 100) {
    latency.add([{ ...trace(atMs, 0), gpuMs: 25 }], [0], atMs, atMs, true);
  }
  assertAlmostEquals(latency.busy(0, 20_000), 0.25, 0.01);
  assertEquals(latency.busy(0, 60_000), 0);
});

Deno.test("a clock's offset is taken from the fastest round trip", () => {
  const offset = new ClockOffset();
  assertEquals([offset.offsetMs, offset.roundTripMs], [0, null]);
  offset.add(0, 100, 1_090); // slow on the way there: reads 1040
  offset.add(200, 202, 1_201); // reads 1000
  offset.add(300, 310, 1_302);
  assertEquals(offset.offsetMs, 1_000);
  assertEquals(offset.roundTripMs, 10);
});
