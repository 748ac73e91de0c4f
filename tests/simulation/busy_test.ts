import { assertEquals, assertGreaterOrEqual } from "@std/assert";
import { PLAIN_REQUEST } from "../../coordinator/engine.ts";
import type { SchedulerConfig } from "../../coordinator/scheduler.ts";
import { seededRandom } from "../../shared/random.ts";
import { NO_FAULTS, SimulatedFleet } from "./simulated_fleet.ts";

const STEP_MS = 10;
const HOP_MS = STEP_MS / 10;

/** 16 sequences on `stages` equal stages: the least busy stage's share of the time, once all decode. */
function leastBusy(stages: number, submitEveryMs: number): number {
  const config: SchedulerConfig = {
    stages,
    maxStepsInFlight: 2 * stages,
    maxRows: 64,
    maxSequencesPerStep: 32,
    maxOutputs: 32,
    prefillRowsPerStep: 64,
    pages: 200,
    contextTokens: 300,
    maxQueuedSequences: 100,
    maxFrameBytes: 1e6,
    frameBytes: () => 0,
  };
  const fleet = new SimulatedFleet({
    random: seededRandom(stages),
    config,
    faults: NO_FAULTS,
    hopMs: HOP_MS,
    stepMs: () => STEP_MS,
  });
  for (let i = 0; i < 16; i++) {
    fleet.clock.after(i * submitEveryMs, () => {
      fleet.submit({
        ...PLAIN_REQUEST,
        id: `s${i}`,
        promptTokens: Uint32Array.from({ length: 5 + i }, (_, j) => i + j),
        maxTokens: 250,
        temperature: 1,
        seed: BigInt(i),
      });
    });
  }
  fleet.run(16 * submitEveryMs + 30 * stages * STEP_MS);
  const before = [...fleet.busyMs], startMs = fleet.clock.nowMs();
  fleet.run(1000);
  assertEquals(fleet.scheduler.stats.running, 16);
  const tookMs = fleet.clock.nowMs() - startMs;
  return Math.min(...fleet.busyMs.map((busy, stage) => (busy - before[stage]) / tookMs));
}

for (const [how, submitEveryMs] of [["at once", 0], ["one by one", 7]] as const) {
  Deno.test(`16 sequences that came ${how} keep 1 to 8 equal stages at least 95 % busy`, () => {
    for (let stages = 1; stages <= 8; stages++) {
      const busy = leastBusy(stages, submitEveryMs);
      assertGreaterOrEqual(busy, 0.95, `${stages} stages are ${(busy * 100).toFixed(1)} % busy`);
    }
  });
}
