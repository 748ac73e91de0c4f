import { assertEquals, assertStringIncludes } from "@std/assert";
import { type Beat, PROTOCOL_VERSION, type WorkerCard } from "../shared/protocol.ts";
import { Membership } from "./membership.ts";

function card(worker: string, instance = "i1", version = PROTOCOL_VERSION): WorkerCard {
  return {
    version,
    worker,
    instance,
    host: "host",
    gpu: { name: "a GPU", software: false },
    memoryBytes: 1,
    maxBindingBytes: 1,
    selfTestDigest: "0".repeat(64),
    calibration: {
      denseBytesPerMs: 1,
      codegemmBytesPerMs: 1,
      wideCodeBytesPerMs: 1,
      overheadMsPerLayer: 0,
    },
    cachedParts: [],
  };
}

function beat(worker: string, sequence: number, changes: Partial<Beat> = {}): Beat {
  return {
    worker,
    instance: "i1",
    sequence,
    sentAtMs: 0,
    epoch: 0,
    state: "idle",
    dropped: {},
    ...changes,
  };
}

function fleet(): Membership {
  return new Membership({ deadAfterMs: 700, forgetAfterMs: 5000 });
}

Deno.test("a worker joins with its card, and its beats keep it alive", () => {
  const members = fleet();
  assertEquals(members.hello(card("a"), 0), [{ type: "joined", worker: "a", instance: "i1" }]);
  assertEquals(members.hello(card("a"), 10), [], "the answer to a roll call");
  for (let at = 100; at < 2000; at += 100) {
    members.beat(beat("a", at), at);
    assertEquals(members.tick(at), []);
  }
  assertEquals(members.usable.map(({ card }) => card.worker), ["a"]);
});

Deno.test("missed beats are a death, and the dead one's beats are ignored until it says hello", () => {
  const members = fleet();
  members.hello(card("a"), 0);
  members.beat(beat("a", 1), 100);
  assertEquals(members.nextTickMs, 800);
  assertEquals(members.tick(799), []);
  assertEquals(members.tick(800), [
    { type: "lost", worker: "a", instance: "i1", reason: "no beat for 700 ms" },
  ]);
  assertEquals(members.tick(900), [], "told once");
  assertEquals(members.beat(beat("a", 9, { epoch: 4, state: "serving" }), 950), null);
  assertEquals([members.usable.length, members.isPresent("a", "i1")], [0, false]);
  assertEquals(members.hello(card("a"), 1000), [{ type: "joined", worker: "a", instance: "i1" }]);
  assertEquals(members.get("a")!.beat, null, "it serves no epoch");
});

Deno.test("a restarted worker is another instance: the old one is lost", () => {
  const members = fleet();
  members.hello(card("a"), 0);
  assertEquals(members.hello(card("a", "i2"), 50).map(({ type }) => type), ["lost", "joined"]);
  assertEquals(members.beat(beat("a", 5), 60), [], "a beat of the old process");
  assertEquals(members.beat(beat("a", 1, { instance: "i2" }), 60)?.length, 1);
});

Deno.test("a disconnect is a death at once", () => {
  const members = fleet();
  members.hello(card("a"), 0);
  assertEquals(members.disconnected("a", "its connection closed").length, 1);
  assertEquals(members.disconnected("a", "its connection closed"), []);
  assertEquals(members.disconnected("nobody", "gone"), []);
});

Deno.test("a worker of another version is kept in sight, refused, with the reason", () => {
  const members = fleet();
  const [event] = members.hello(card("old", "i1", PROTOCOL_VERSION + 1), 0);
  assertEquals(event.type, "refused");
  assertEquals(members.usable, []);
  assertStringIncludes(members.get("old")!.note, "run the same release on both");
});

Deno.test("a worker that leaves gets no new stage but stays present", () => {
  const members = fleet();
  members.hello(card("a"), 0);
  assertEquals(members.leaving("a", "another"), []);
  assertEquals(members.leaving("a", "i1"), [{ type: "leaving", worker: "a", instance: "i1" }]);
  assertEquals(members.leaving("a", "i1"), []);
  assertEquals([members.usable.length, members.isPresent("a", "i1")], [0, true]);
});

Deno.test("a change of state or epoch is told once; doubled and late beats are not news", () => {
  const members = fleet();
  members.hello(card("a"), 0);
  const change = [{ type: "changed", worker: "a", instance: "i1" }] as const;
  assertEquals(members.beat(beat("a", 1), 1), [...change]);
  assertEquals(members.beat(beat("a", 2), 2), []);
  assertEquals(members.beat(beat("a", 3, { state: "loading", epoch: 1 }), 3), [...change]);
  assertEquals(members.beat(beat("a", 3, { state: "loading", epoch: 1 }), 4), []);
  assertEquals(members.beat(beat("a", 2), 600), [], "late");
  assertEquals(members.get("a")!.lastBeatAtMs, 3);
});

Deno.test("a lost worker is forgotten in time", () => {
  const members = fleet();
  members.hello(card("a"), 0);
  members.tick(700);
  assertEquals(members.members.length, 1);
  members.tick(5000);
  assertEquals(members.members.length, 0);
});

Deno.test("of two processes of one name the one that came last counts, and they do not take turns", () => {
  const members = fleet();
  members.hello(card("a", "old"), 0);
  assertEquals(members.hello(card("a", "new"), 10).map(({ type }) => type), ["lost", "joined"]);
  assertEquals(members.beat(beat("a", 7, { instance: "old" }), 20), [], "no roll call for it");
  assertEquals(members.hello(card("a", "old"), 30), [
    { type: "namesake", worker: "a", instance: "old" },
  ]);
  assertEquals(members.hello(card("a", "old"), 40), [], "told once");
  assertEquals(members.isPresent("a", "new"), true);
  assertStringIncludes(members.get("a")!.note, "--name");
  members.tick(800);
  assertEquals(members.beat(beat("a", 8, { instance: "old" }), 810), null, "its successor is gone");
  assertEquals(members.hello(card("a", "old"), 820).map(({ type }) => type), ["joined"]);
});

Deno.test("a worker cannot be called as the coordinator is", () => {
  const [event] = fleet().hello(card("coordinator"), 0);
  assertEquals(event.type, "refused");
});

Deno.test("past its bound the fleet takes no more workers, and forgets those it lost first", () => {
  const members = new Membership({ deadAfterMs: 700, forgetAfterMs: 5000, maxWorkers: 2 });
  members.hello(card("a"), 0);
  members.hello(card("b"), 100);
  assertEquals(members.hello(card("c"), 200).map(({ type }) => type), ["refused"]);
  members.tick(750);
  assertEquals(members.hello(card("c"), 760).map(({ type }) => type), ["joined"]);
  assertEquals(members.members.map(({ card }) => card.worker), ["b", "c"]);
});

Deno.test("after an outage of our own nobody is dead who had no chance to be heard", () => {
  const members = fleet();
  members.hello(card("a"), 0);
  members.excuse(4_800, 5_000);
  assertEquals(members.tick(5_400), []);
  assertEquals(members.tick(5_500).map(({ type }) => type), ["lost"]);
});
