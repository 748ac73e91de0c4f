import { assertEquals, assertRejects } from "@std/assert";
import { VirtualClock } from "../../shared/clock.ts";
import { FleetError } from "../../shared/errors.ts";
import { eventPayloads } from "../monitor/event_stream.js";
import { eventStream } from "./sse.ts";

Deno.test("a silent stream sends comments, which are no events", async () => {
  const clock = new VirtualClock();
  let say = (_: string) => {};
  const said = new Promise<string>((resolve) => say = resolve);
  async function* events() {
    yield await said;
  }
  const reader = eventStream(events(), clock, new AbortController()).body!.getReader();
  const first = reader.read();
  await Promise.resolve();
  clock.advance(15_000);
  assertEquals(new TextDecoder().decode((await first).value), ": still here\n\n");
  const second = reader.read();
  say("hello");
  assertEquals(new TextDecoder().decode((await second).value), "data: hello\n\n");
  assertEquals((await reader.read()).done, true);
  // Nothing is left waiting on the clock.
  assertEquals(clock.step(), false);
});

Deno.test("events are taken when there is room for them, and a reader that leaves aborts", async () => {
  let taken = 0;
  async function* events() {
    while (true) yield String(taken++);
  }
  const abort = new AbortController();
  const reader = eventStream(events(), new VirtualClock(), abort).body!.getReader();
  await reader.read();
  await reader.read();
  assertEquals([taken, abort.signal.aborted], [2, false]);
  await reader.cancel();
  assertEquals(abort.signal.aborted, true);
});

Deno.test("a reader that takes nothing for a minute is let go of; one that merely waits is not", async () => {
  const clock = new VirtualClock();
  let ended = false;
  async function* events() {
    try {
      while (true) yield "more";
    } finally {
      ended = true;
    }
  }
  const abort = new AbortController();
  const reader = eventStream(events(), clock, abort).body!.getReader();
  for (let i = 0; i < 5; i++) {
    await reader.read();
    clock.advance(59_000);
  }
  assertEquals([abort.signal.aborted, ended], [false, false]);
  clock.advance(1_000);
  assertEquals(abort.signal.aborted, true);
  await assertRejects(() => reader.read(), FleetError, "stopped reading");
  assertEquals([ended, clock.step()], [true, false]);
});

Deno.test("payloads are read back whole, wherever the chunks are cut", async () => {
  const text = ': hi\n\ndata: {"a":"é"}\n\ndata: two\ndata:lines\r\n\r\nevent: x\ndata: [DONE]\n\n';
  const bytes = new TextEncoder().encode(text);
  for (const size of [1, 2, 7, 1000]) {
    const chunks = Array.from(
      { length: Math.ceil(bytes.length / size) },
      (_, at) => bytes.slice(at * size, (at + 1) * size),
    );
    const payloads = await Array.fromAsync(eventPayloads(ReadableStream.from(chunks)));
    assertEquals(payloads, ['{"a":"é"}', "two\nlines", "[DONE]"]);
  }
});
