import { assertEquals } from "@std/assert";
import { Probation } from "./probation.ts";

Deno.test("a process that failed is left out, twice as long each time, up to a quarter of an hour", () => {
  const probation = new Probation();
  let nowMs = 0;
  const spans = Array.from({ length: 8 }, () => {
    const forMs = probation.failed("w", "i1", "no luck", nowMs);
    assertEquals(probation.exclusion("w", "i1", nowMs + forMs - 1), "no luck");
    assertEquals(probation.exclusion("w", "i1", nowMs + forMs), null);
    nowMs += forMs;
    return forMs / 1000;
  });
  assertEquals(spans, [30, 60, 120, 240, 480, 900, 900, 900]);
});

Deno.test("a restarted process is not its failed predecessor, but shares its name's record", () => {
  const probation = new Probation();
  probation.failed("w", "i1", "no luck", 0);
  assertEquals(probation.exclusion("w", "i2", 1), null);
  assertEquals(probation.failed("w", "i2", "again", 1), 60_000);
});

Deno.test("one loss is an accident; a worker that flaps has to keep still for longer and longer", () => {
  const probation = new Probation();
  probation.lost("w", 0);
  assertEquals(probation.isSteady("w", 1), true);
  probation.lost("w", 1_000);
  assertEquals([probation.isSteady("w", 30_999), probation.isSteady("w", 31_000)], [false, true]);
  probation.lost("w", 40_000);
  assertEquals([probation.isSteady("w", 99_999), probation.isSteady("w", 100_000)], [false, true]);
  assertEquals(probation.exclusion("w", "i1", 41_000), null, "it may serve where it is needed");
  assertEquals(probation.isSteady("other", 0), true);
});

Deno.test("tick() tells once when somebody may be tried again, and forgives after three hours", () => {
  const probation = new Probation();
  probation.failed("w", "i1", "no luck", 0);
  assertEquals([probation.tick(29_999), probation.tick(30_000), probation.tick(30_001)], [
    false,
    true,
    false,
  ]);
  probation.tick(10_800_000);
  assertEquals(probation.failed("w", "i1", "no luck", 10_800_000), 30_000);
});
