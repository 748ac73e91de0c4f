import { assertEquals, assertNotEquals, assertThrows } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { freePort, listens } from "./ports.ts";

Deno.test("a port that somebody has is refused in words, and seen to be listened on", async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const error = assertThrows(() => freePort(port), FleetError, `Port ${port} cannot be had`);
  assertEquals(error.code, "bad-usage");
  assertEquals(await listens(port), true);
  listener.close();
  assertEquals(await listens(port), false);
  assertEquals(freePort(port), port);
  assertNotEquals(freePort(), 0);
});
