import { assertEquals } from "@std/assert";
import { VirtualClock } from "../shared/clock.ts";
import type { TimedReport } from "./calibrated.ts";
import { PHASES } from "./phases.ts";
import { duration, progressLines } from "./progress.ts";

const PHASE_SECONDS = Object.fromEntries(
  PHASES.map((phase) => [phase, 0]),
) as TimedReport["phases"];

function block(seconds: number, errors: [before: number, after: number][]): TimedReport {
  const matrices = errors.map(([errorBefore, errorAfter]) => ({
    name: "mlp.up_proj" as const,
    errorBefore,
    errorAfter,
    seconds,
  }));
  return { matrices, outputError: 0.125, seconds, phases: PHASE_SECONDS };
}

Deno.test("durations have the unit that fits them", () => {
  assertEquals([50, 599, 720, 14_520].map(duration), ["50 s", "599 s", "12 min", "4.0 h"]);
});

Deno.test("a run that goes on at block 41 foretells the rest from the blocks that it did itself", () => {
  const lines: string[] = [];
  const { onBlock } = progressLines(
    new VirtualClock(),
    (line) => lines.push(line),
    { parts: false },
  );
  onBlock(block(180, [[0.2, 0.1], [0.4, 0.2]]), 41, 80);
  onBlock(block(200, []), 42, 80);
  assertEquals(lines, [
    "block 41/80: weighted error 30.00 % -> 15.00 %, output 12.50 %, 180.0 s, blocks: 117 min to go",
    "block 42/80: all kept in float16, output 12.50 %, 200.0 s, blocks: 2.0 h to go",
  ]);
});

Deno.test("steps are timed from the first that this run took, weights told of every ten seconds", async () => {
  const clock = new VirtualClock(), lines: string[] = [];
  const { onCheck, onStep, onPart } = progressLines(clock, (line) => lines.push(line), {
    parts: true,
  });
  onCheck(10, 100);
  await clock.advance(12_000);
  onCheck(25, 100);
  onCheck(26, 100);
  onStep(48, 256, 0.5);
  await clock.advance(1600);
  onStep(64, 256, 0.25);
  onPart(0, "weights", 9.06);
  assertEquals(lines, [
    "weights looked through: 25 %, 36 s to go",
    "step 48/256: divergence 0.5000",
    "step 64/256: divergence 0.2500, 100 ms a step, 19 s to go",
    "block 1: weights, 9.1 s",
  ]);
});
