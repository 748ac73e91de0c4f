import { assert, assertEquals, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { Thread } from "./thread.ts";
import type { TestCalls } from "./thread_fixture.ts";

const start = () => new Thread<TestCalls>(new URL("./thread_fixture.ts", import.meta.url), "test");

Deno.test("a call moves its buffers to the thread and back", async () => {
  const thread = start();
  const bytes = Uint8Array.of(1, 2, 3);
  const result = await thread.call("double", { bytes }, { transfer: [bytes.buffer] });
  assertEquals([bytes.length, [...result]], [0, [2, 4, 6]]);
  thread.close();
});

Deno.test("a call tells how it goes, and ends when its signal aborts", async () => {
  const thread = start();
  const abort = new AbortController();
  const notes: number[] = [];
  const onNote = (note: number) => notes.push(note) === 3 && abort.abort();
  assertEquals(await thread.call("count", null, { onNote, signal: abort.signal }), "aborted");
  assertEquals(notes.slice(0, 3), [1, 2, 3]);
  assertEquals(await thread.call("count", null, { signal: AbortSignal.abort() }), "aborted");
  thread.close();
});

Deno.test("a FleetError crosses threads with its code", async () => {
  const thread = start();
  const error = await assertRejects(
    () => thread.call("refuse", { reason: "the disk is full" }),
    FleetError,
    "the disk is full",
  );
  assertEquals(error.code, "disk");
  thread.close();
});

Deno.test("the death of a thread rejects its calls, those to come, and says why", async () => {
  const thread = start();
  await assertRejects(() => thread.call("die", null), FleetError, "on purpose");
  assert((await thread.death).message.includes("test thread died"));
  await assertRejects(() => thread.call("refuse", { reason: "" }), FleetError, "on purpose");
});

Deno.test("closing a thread rejects its calls", async () => {
  const thread = start();
  const call = thread.call("count", null);
  thread.close();
  await assertRejects(() => call, FleetError, "closed");
});

Deno.test("a thread that waits for a message wakes when it comes, and has it; or when time is up", async () => {
  const thread = start();
  const waiting = Promise.withResolvers<void>();
  const woken = thread.call("wait", { ms: 60_000 }, { onNote: () => waiting.resolve() });
  await waiting.promise;
  await thread.call("double", { bytes: new Uint8Array(4) });
  const { waits, doubled } = await woken;
  assert(waits <= 2 && doubled === 1, `${doubled} messages in ${waits} waits`);
  const inVain = await thread.call("wait", { ms: 5 });
  assert(inVain.doubled === 0 && inVain.ms >= 5, `${inVain.ms} ms`);
  thread.close();
});

Deno.test("a message that comes before its bell has rung keeps no thread from waiting", async () => {
  const worker = new Worker(new URL("./thread_fixture.ts", import.meta.url), { type: "module" });
  const bell = new SharedArrayBuffer(4);
  const answered = Promise.withResolvers<{ waits: number; ms: number }>();
  worker.onmessage = ({ data }) => data.type === "done" && answered.resolve(data.result);
  worker.postMessage({ type: "bell", bell });
  worker.postMessage({ type: "call", id: 0, call: "wait", args: { ms: 20 } });
  const { waits, ms } = await answered.promise;
  assert(waits <= 2 && ms >= 20, `${waits} waits in ${ms} ms`);
  worker.terminate();
});
