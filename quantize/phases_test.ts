import { assertEquals } from "@std/assert";
import { VirtualClock } from "../shared/clock.ts";
import { PHASES, Stopwatch } from "./phases.ts";

Deno.test("a stopwatch gives each phase its laps, and tells what ended with the time since", async () => {
  const clock = new VirtualClock(), told: [string, number][] = [];
  const watch = new Stopwatch(clock, (what, seconds) => told.push([what, seconds]));
  const pass = (ms: number) => clock.advance(ms);
  await pass(2000);
  watch.lap("read");
  watch.tell("weights");
  await pass(500);
  watch.lap("codes");
  await pass(1500);
  watch.lap("codebooks");
  await pass(250);
  watch.lap("codes");
  assertEquals(watch.tell("a matrix"), 2.25);
  const zeros = Object.fromEntries(PHASES.map((phase) => [phase, 0]));
  assertEquals(watch.seconds as object, { ...zeros, read: 2, codes: 0.75, codebooks: 1.5 });
  assertEquals(told, [["weights", 2], ["a matrix", 2.25]]);
});
