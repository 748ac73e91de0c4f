import { assertAlmostEquals, assertEquals } from "@std/assert";
import { StepTimes } from "./step_times.ts";

const decode = (rows: number) => ({
  decodeRows: rows,
  rows,
  outputs: rows,
  contextTokens: 256,
  prefillTiles: 0,
});

Deno.test("StepTimes foretells a step by the last ones of its kind, an unknown one by the shortest", () => {
  const times = new StepTimes();
  for (let i = 0; i < 2; i++) times.record(decode(1), 4);
  for (let i = 0; i < 5; i++) times.record(decode(8), 20);
  assertAlmostEquals(times.surelyMs(decode(8)), 19.6, 1e-9);
  assertAlmostEquals(times.surelyMs(decode(2)), 3.92, 1e-9);
});

Deno.test("StepTimes believes no first step of a kind, for it may have compiled its kernels", () => {
  const times = new StepTimes();
  assertEquals(times.surelyMs(decode(1)), 0);
  for (const rows of [1, 2, 4, 8]) times.record(decode(rows), 1000);
  assertEquals([1, 2, 3].map((rows) => times.surelyMs(decode(rows))), [0, 0, 0]);
  times.record(decode(1), 10);
  for (const rows of [1, 2, 3]) assertAlmostEquals(times.surelyMs(decode(rows)), 9.8, 1e-9);
});

Deno.test("StepTimes believes no single slow step, a quick one at once, and slow ones in the end", () => {
  const times = new StepTimes();
  const foretold = (gpuMs: number) => {
    times.record(decode(1), gpuMs);
    return Math.round(times.surelyMs(decode(1)) / 0.98);
  };
  assertEquals([10, 10, 100, 11, 90, 5].map(foretold), [0, 10, 10, 10, 10, 5]);
  assertEquals([30, 30, 30, 30, 31].map(foretold), [5, 5, 5, 30, 30]);
});

Deno.test("StepTimes forgets the kinds it has not seen for long", () => {
  const times = new StepTimes();
  for (let rows = 1; rows <= 300; rows++) {
    for (let i = 0; i < 2; i++) times.record(decode(rows), rows + 100);
  }
  assertAlmostEquals(times.surelyMs(decode(300)), 392, 1e-9);
  assertAlmostEquals(times.surelyMs(decode(44)), 101 * 0.98, 1e-9);
  assertAlmostEquals(times.surelyMs(decode(45)), 145 * 0.98, 1e-9);
});
