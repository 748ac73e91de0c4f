import { assert, assertEquals, assertThrows } from "@std/assert";
import { VirtualClock } from "../../shared/clock.ts";
import { FleetError } from "../../shared/errors.ts";
import { snapshotFixture } from "../../tests/snapshot_fixture.ts";
import { SnapshotFeed } from "./snapshot_feed.ts";

function feedOf(maxWatchers?: number) {
  const clock = new VirtualClock();
  const fleet = { epoch: 0, drawn: 0, listeners: new Set<() => void>() };
  const engine = {
    snapshot() {
      fleet.drawn++;
      const picture = snapshotFixture();
      picture.plan!.epoch = fleet.epoch;
      return picture;
    },
    onChange(listener: () => void) {
      fleet.listeners.add(listener);
      return () => fleet.listeners.delete(listener);
    },
  };
  const change = () => {
    fleet.epoch++;
    for (const listener of fleet.listeners) listener();
  };
  return { clock, fleet, change, feed: new SnapshotFeed(engine, clock, maxWatchers) };
}

const epochOf = (result: IteratorResult<string>) => JSON.parse(result.value).plan.epoch;

Deno.test("a burst of changes is one snapshot, a quarter of a second after the one before", async () => {
  const { clock, fleet, change, feed } = feedOf();
  const stop = new AbortController();
  const watching = feed.follow(stop.signal);
  assertEquals(epochOf(await watching.next()), 0);
  for (let i = 0; i < 50; i++) change();
  const next = watching.next();
  clock.advance(249);
  assertEquals(fleet.drawn, 1);
  clock.advance(1);
  assertEquals([epochOf(await next), fleet.drawn], [50, 2]);
  stop.abort();
});

Deno.test("an unchanging fleet is shown every second", async () => {
  const { clock, feed } = feedOf();
  const stop = new AbortController();
  const watching = feed.follow(stop.signal);
  await watching.next();
  for (let second = 0; second < 3; second++) {
    const next = watching.next();
    clock.advance(1_000);
    assertEquals((await next).done, false);
  }
  stop.abort();
});

Deno.test("many watchers cost one drawing each time; a slow one gets only the newest", async () => {
  const { clock, fleet, change, feed } = feedOf();
  const stop = new AbortController();
  const watchers = Array.from({ length: 10 }, () => feed.follow(stop.signal));
  for (const watcher of watchers) await watcher.next();
  const drawn = fleet.drawn;
  for (let i = 0; i < 5; i++) {
    change();
    clock.advance(250);
  }
  assertEquals(fleet.drawn - drawn, 5);
  assertEquals(epochOf(await watchers[0].next()), 5);
  stop.abort();
});

Deno.test("whoever leaves frees a place; with the last one the feed rests", async () => {
  const { clock, fleet, feed } = feedOf(1);
  const stop = new AbortController();
  const watching = feed.follow(stop.signal);
  await watching.next();
  const pending = watching.next();
  assertThrows(() => feed.follow(new AbortController().signal), FleetError, "already");
  stop.abort();
  assert((await pending).done);
  assertEquals([fleet.listeners.size, clock.step()], [0, false]);
  const again = new AbortController();
  assertEquals((await feed.follow(again.signal).next()).done, false);
  again.abort();
});
