import {
  assert,
  assertEquals,
  assertGreater,
  assertNotEquals,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { VirtualClock } from "./clock.ts";
import { FleetError } from "./errors.ts";
import { type BusFaults, MemoryHub } from "./memory_bus.ts";
import { subjectMatches } from "./subject.ts";

const bytes = (...values: number[]) => Uint8Array.from(values);

Deno.test("subjectMatches() knows * and > as NATS does", () => {
  const cases: [pattern: string, subject: string, matches: boolean][] = [
    ["a.b", "a.b", true],
    ["a.b", "a.b.c", false],
    ["a.b.c", "a.b", false],
    ["a.*", "a.b", true],
    ["a.*", "a", false],
    ["a.*.c", "a.b.c", true],
    ["a.>", "a.b.c", true],
    ["a.>", "a", false],
    [">", "a", true],
    ["*", "a.b", false],
  ];
  for (const [pattern, subject, matches] of cases) {
    assertEquals(subjectMatches(pattern, subject), matches, `${pattern} and ${subject}`);
  }
});

Deno.test("a message reaches everybody who listens, later, each with bytes of their own", () => {
  const clock = new VirtualClock(), hub = new MemoryHub({ clock });
  const got: string[] = [];
  const buffers = new Set<ArrayBuffer>();
  for (const pattern of ["f.beat.*", "f.>", "f.beat.a"]) {
    hub.connect(pattern).subscribe(pattern, (message) => {
      got.push(`${pattern} ${message.subject} ${message.data}`);
      buffers.add(message.data.buffer);
    });
  }
  const sent = bytes(1, 2);
  hub.connect("a").publish("f.beat.a", sent);
  sent.fill(0);
  assertEquals(got, []);
  clock.advance(0);
  assertEquals(got, ["f.beat.* f.beat.a 1,2", "f.> f.beat.a 1,2", "f.beat.a f.beat.a 1,2"]);
  assertEquals(buffers.size, 3);
});

Deno.test("an unsubscribed handler hears nothing more, and a failing one stops nobody", () => {
  const clock = new VirtualClock(), hub = new MemoryHub({ clock });
  const bus = hub.connect("a");
  const logged: unknown[] = [];
  const { error } = console;
  console.error = (...args: unknown[]) => logged.push(args[0]);
  let first = 0, second = 0;
  const subscription = bus.subscribe("x", () => {
    first++;
    throw new Error("on purpose");
  });
  bus.subscribe("x", () => second++);
  try {
    bus.publish("x", bytes());
    clock.advance(0);
    subscription.unsubscribe();
    bus.publish("x", bytes());
    clock.advance(0);
  } finally {
    console.error = error;
  }
  assertEquals([first, second, logged.length], [1, 2, 1]);
});

Deno.test("a request is answered; without listeners it fails at once, without an answer in time", async () => {
  const clock = new VirtualClock(), hub = new MemoryHub({ clock, latencyMs: 5 });
  const server = hub.connect("server"), client = hub.connect("client");
  server.subscribe("double", (message) => message.respond!(bytes(message.data[0] * 2)));
  server.subscribe("silent", (message) => assert(message.respond));

  const answer = client.request("double", bytes(21), 100);
  clock.advance(10);
  assertEquals(await answer, bytes(42));

  const nobody = client.request("nowhere", bytes(), 100);
  clock.advance(0);
  assertEquals((await assertRejects(() => nobody, FleetError, "Nobody")).code, "nats");

  const silence = client.request("silent", bytes(), 100);
  clock.advance(100);
  assertEquals((await assertRejects(() => silence, FleetError, "100 ms")).code, "timeout");
});

Deno.test("a message above the payload bound is refused where it is sent", async () => {
  const bus = new MemoryHub({ clock: new VirtualClock(), maxPayloadBytes: 4 }).connect("a");
  const error = assertThrows(() => bus.publish("x", new Uint8Array(5)), FleetError, "5 bytes");
  assertEquals(error.code, "too-large");
  await assertRejects(() => bus.request("x", new Uint8Array(5), 10), FleetError, "5 bytes");
});

/** Sends 300 numbered messages on each of two subjects, 1 ms apart; what the listener got. */
function underFaults(seed: number, faults: BusFaults) {
  const clock = new VirtualClock(), hub = new MemoryHub({ clock, seed, latencyMs: 1 });
  const got: { subject: string; value: number }[] = [];
  hub.connect("b").subscribe(">", ({ subject, data }) => {
    got.push({ subject, value: new DataView(data.buffer).getUint16(0) });
  });
  hub.faults = faults;
  const sender = hub.connect("a");
  for (let i = 0; i < 300; i++) {
    for (const subject of ["step.b.a.1", "beat.a"]) sender.publish(subject, bytes(i >> 8, i & 255));
    clock.advance(1);
  }
  while (clock.step());
  const on = (wanted: string) => got.filter((m) => m.subject === wanted).map((m) => m.value);
  return { steps: on("step.b.a.1"), beats: on("beat.a"), counts: hub.counts };
}

const FAULTS: BusFaults = {
  lose: 0.1,
  double: 0.1,
  delay: 0.2,
  maxDelayMs: 20,
  subject: (subject) => subject.startsWith("step."),
};

Deno.test("faults strike the chosen subjects only, and one seed replays them", () => {
  const once = underFaults(5, FAULTS);
  assertEquals(once.beats, Array.from({ length: 300 }, (_, i) => i));
  assertNotEquals(once.steps, once.beats);
  assertEquals(underFaults(5, FAULTS), once);
  assertNotEquals(underFaults(6, FAULTS).steps, once.steps);
  for (const kind of ["lost", "doubled", "delayed"] as const) assertGreater(once.counts[kind], 10);
});

Deno.test("loss and delay keep the order of a publisher's messages on a subject", () => {
  const { steps, counts } = underFaults(7, { ...FAULTS, double: 0 });
  assertEquals(steps, [...steps].sort((a, b) => a - b));
  assertEquals(steps.length, 300 - counts.lost);
});

Deno.test("a second copy may come late, after what was sent behind it", () => {
  const { steps } = underFaults(8, { ...FAULTS, lose: 0, delay: 0 });
  const firsts = steps.filter((value, at) => steps.indexOf(value) === at);
  assertGreater(steps.length, 300);
  assert(steps.some((value, at) => at > 0 && value < steps[at - 1]));
  assertEquals(firsts, Array.from({ length: 300 }, (_, i) => i));
});

Deno.test("an endpoint that is cut off neither sends nor hears, and is back when restored", async () => {
  const clock = new VirtualClock(), hub = new MemoryHub({ clock, latencyMs: 5 });
  const a = hub.connect("a"), b = hub.connect("b");
  const got: number[] = [], changes: string[] = [];
  b.subscribe("x", ({ data }) => got.push(data[0]));
  b.onStatus((status) => changes.push(status));
  a.publish("x", bytes(1));
  b.cut();
  clock.advance(5);
  a.publish("x", bytes(2));
  const unheard = a.request("x", bytes(3), 100);
  clock.advance(5);
  await assertRejects(() => unheard, FleetError, "Nobody");
  b.publish("x", bytes(4));
  b.restore();
  a.publish("x", bytes(5));
  clock.advance(5);
  assertEquals(got, [5]);
  await b.close();
  assertEquals(changes, ["disconnected", "connected", "closed"]);
  assertThrows(() => b.publish("x", bytes()), FleetError, "closed");
});
