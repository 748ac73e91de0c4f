import { assertEquals, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import type { GenerateEvent } from "./engine.ts";
import { EventStream } from "./event_stream.ts";

const token = (id: number): GenerateEvent => ({
  type: "token",
  token: id,
  logprob: -1,
  alternatives: [],
});

Deno.test("events come in order, also to a reader that waits, and end with the finish", async () => {
  let closed = 0;
  const stream = new EventStream(() => closed++);
  const read = Array.fromAsync(
    stream,
    (event) => event.type === "token" ? event.token : event.reason,
  );
  stream.push(token(1));
  await Promise.resolve();
  stream.push(token(2));
  stream.push({ type: "finish", reason: "stop" });
  stream.push(token(3));
  assertEquals(await read, [1, 2, "stop"]);
  assertEquals(closed, 0);
});

Deno.test("a failure comes behind the tokens that were there", async () => {
  const stream = new EventStream(() => {});
  stream.push(token(1));
  stream.fail(new FleetError("unavailable", "the last worker is gone"));
  assertEquals((await stream.next()).value, token(1));
  await assertRejects(() => stream.next(), FleetError, "last worker");
});

Deno.test("a reader that leaves closes the stream once, and pushes after that are let go", async () => {
  let closed = 0;
  const stream = new EventStream(() => closed++);
  stream.push(token(1));
  for await (const _ of stream) break;
  stream.push(token(2));
  stream.close();
  assertEquals(closed, 1);
  assertEquals((await stream.next()).done, true);
});
