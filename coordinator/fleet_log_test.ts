import { assert, assertEquals } from "@std/assert";
import { VirtualClock } from "../shared/clock.ts";
import { FleetLog, Rejections } from "./fleet_log.ts";

Deno.test("a flood about one thing neither pushes out the others nor fills the log", () => {
  const clock = new VirtualClock();
  const printed: string[] = [];
  const log = new FleetLog(clock, ({ text }) => printed.push(text));
  const rejections = new Rejections(log);
  log.add("plans", "info", "epoch 1 serves");
  for (let second = 0; second < 60; second++) {
    for (let i = 0; i < 100; i++) rejections.warn("malformed-message", `rubbish ${second}.${i}`);
    clock.advance(1_000);
    log.tick();
  }
  const texts = log.events.map(({ text }) => text);
  assert(texts.includes("epoch 1 serves"));
  assertEquals(rejections.counts, { "malformed-message": 6_000 });
  assert(printed.length < 80, `${printed.length} lines`);
  assert(texts.length < 50, `${texts.length} events`);
  assert(
    texts.some((text) => text.startsWith("990 more events about malformed-message")),
    texts.join("\n"),
  );
  assertEquals(texts.at(-1), "epoch 1 serves", "newest first");
});

Deno.test("a few events are all told, and nothing is said about those that were not many", () => {
  const clock = new VirtualClock();
  const log = new FleetLog(clock, () => {});
  for (let i = 0; i < 5; i++) log.add("workers", "info", `w${i} joined`);
  clock.advance(60_000);
  log.tick();
  assertEquals(log.events.map(({ text }) => text), [4, 3, 2, 1, 0].map((i) => `w${i} joined`));
});

Deno.test("words of others stay on one line", () => {
  const log = new FleetLog(new VirtualClock(), () => {});
  log.add("workers", "error", "w1 failed: \x1b[2Jno\r\nluck\x00");
  assertEquals(log.events[0].text, "w1 failed:  [2Jno luck ");
});
