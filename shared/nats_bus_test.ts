import {
  assert,
  assertEquals,
  assertGreater,
  assertInstanceOf,
  assertLess,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { freePort, startNatsServer } from "../tests/nats_server.ts";
import type { Bus, BusStatus } from "./bus.ts";
import { FleetError } from "./errors.ts";
import { connectNats, type NatsOptions, parseCredentials, requireJetStream } from "./nats_bus.ts";

const bytes = (...values: number[]) => Uint8Array.from(values);

/** Resolves at the first status that is `wanted`. */
function becomes(bus: Bus, wanted: BusStatus): Promise<void> {
  if (bus.status === wanted) return Promise.resolve();
  return new Promise((resolve) => {
    const subscription = bus.onStatus((status) => {
      if (status !== wanted) return;
      subscription.unsubscribe();
      resolve();
    });
  });
}

async function bus(url: string, name: string, options: Partial<NatsOptions> = {}): Promise<Bus> {
  return (await connectNats({ url, name, ...options })).bus;
}

Deno.test("the NATS bus against a real server", async (t) => {
  await using server = await startNatsServer();
  const a = await bus(server.url, "a"), b = await bus(server.url, "b");

  await t.step(
    "delivers in order, wildcards included, in bytes of the receiver's own",
    async () => {
      const got: string[] = [];
      const last = Promise.withResolvers<void>();
      const subscription = b.subscribe("t.step.b.>", ({ subject, data, respond }) => {
        assertEquals([data.byteOffset, data.buffer.byteLength], [0, data.byteLength]);
        assertEquals(respond, undefined);
        got.push(`${subject} ${data[0]}`);
        if (data[0] === 9) last.resolve();
      });
      await b.flush();
      const frame = new Uint8Array(5);
      for (let i = 0; i < 10; i++) {
        frame[0] = i;
        a.publish("t.step.b.a.7", frame);
      }
      await last.promise;
      assertEquals(got, Array.from({ length: 10 }, (_, i) => `t.step.b.a.7 ${i}`));
      subscription.unsubscribe();
    },
  );

  await t.step("a handler that throws is logged, and the next message comes", async () => {
    const { error } = console;
    const logged: unknown[] = [];
    console.error = (...args: unknown[]) => logged.push(args[0]);
    try {
      const second = Promise.withResolvers<void>();
      let count = 0;
      const subscription = b.subscribe("t.throw", () => {
        if (++count === 2) second.resolve();
        throw new Error("on purpose");
      });
      await b.flush();
      a.publish("t.throw", bytes());
      a.publish("t.throw", bytes());
      await second.promise;
      subscription.unsubscribe();
      await b.flush();
    } finally {
      console.error = error;
    }
    assertEquals(logged, Array(2).fill("The handler of t.throw failed:"));
  });

  await t.step(
    "requests are answered, refused at once without listeners, or time out",
    async () => {
      b.subscribe("t.double", ({ data, respond }) => respond!(bytes(data[0] * 2)));
      b.subscribe("t.silent", () => {});
      await b.flush();
      assertEquals(await a.request("t.double", bytes(21), 1000), bytes(42));
      const nobody = await assertRejects(() => a.request("t.nobody", bytes(), 5000), FleetError);
      assertEquals([nobody.code, nobody.message], ["nats", "Nobody listens on t.nobody"]);
      const late = await assertRejects(() => a.request("t.silent", bytes(), 50), FleetError);
      assertEquals(late.code, "timeout");
    },
  );

  await t.step("a message of the largest size passes, one byte more is refused", async () => {
    const got = Promise.withResolvers<number>();
    b.subscribe("t.big", ({ data }) => got.resolve(data.byteLength));
    await b.flush();
    a.publish("t.big", new Uint8Array(a.maxPayloadBytes));
    assertEquals(await got.promise, 2 ** 20);
    const tooBig = () => a.publish("t.big", new Uint8Array(a.maxPayloadBytes + 1));
    assertEquals(assertThrows(tooBig, FleetError).code, "too-large");
  });

  await t.step(
    "outlives a restart of the server; what is published meanwhile is lost",
    async () => {
      const got: number[] = [];
      const found = Promise.withResolvers<void>();
      b.subscribe("t.outage", ({ data }) => {
        got.push(data[0]);
        if (data[0] === 2) found.resolve();
      });
      await b.flush();
      await server.kill();
      await Promise.all([becomes(a, "disconnected"), becomes(b, "disconnected")]);
      a.publish("t.outage", bytes(1));
      await assertRejects(() => a.flush(), FleetError, "lost");
      await server.restart();
      const restartedAt = performance.now();
      await Promise.all([becomes(a, "connected"), becomes(b, "connected")]);
      assertLess(performance.now() - restartedAt, 3000);
      await b.flush();
      a.publish("t.outage", bytes(2));
      await found.promise;
      assertEquals(got, [2]);
    },
  );

  await t.step("a server that is frozen is noticed, and found again when it goes on", async () => {
    server.signal("SIGSTOP");
    const frozenAt = performance.now();
    await Promise.all([becomes(a, "disconnected"), becomes(b, "disconnected")]);
    const noticedMs = performance.now() - frozenAt;
    server.signal("SIGCONT");
    assertLess(noticedMs, 4000);
    await Promise.all([becomes(a, "connected"), becomes(b, "connected")]);
    await b.flush();
    assertEquals(await a.request("t.double", bytes(4), 2000), bytes(8));
  });

  await t.step(
    "a server that stops reading fills a bounded buffer, then messages are lost",
    async () => {
      const link = await connectNats({ url: server.url, name: "c" });
      const { outBytes } = link.connection.stats();
      server.signal("SIGSTOP");
      for (let i = 0; i < 128; i++) link.bus.publish("t.flood", new Uint8Array(2 ** 20));
      server.signal("SIGCONT");
      const takenMiB = (link.connection.stats().outBytes - outBytes) / 2 ** 20;
      await link.bus.close();
      assertGreater(takenMiB, 60);
      assertLess(takenMiB, 80);
    },
  );

  await t.step("JetStream is there", async () => {
    const link = await connectNats({ url: server.url, name: "c" });
    assertGreater((await requireJetStream(link.connection)).limits.max_streams, -2);
    await link.bus.close();
  });

  await t.step("a closed bus says so, once, and close() may be repeated", async () => {
    const changes: BusStatus[] = [];
    a.onStatus((status) => changes.push(status));
    await a.close();
    await a.close();
    assertEquals(changes, ["closed"]);
    assertThrows(() => a.publish("t.x", bytes()), FleetError, "closed");
    await b.close();
  });

  await t.step("a bus can be closed while the server is away", async () => {
    const c = await bus(server.url, "c");
    await server.kill();
    await becomes(c, "disconnected");
    await c.close();
    assertEquals(c.status, "closed");
  });
});

Deno.test("a connection that fails says which part is missing", async (t) => {
  await using server = await startNatsServer({
    workers: ["w"],
    configure: (config) => config.replace(/jetstream: enabled/, ""),
  });
  const fails = async (options: Partial<NatsOptions>) => {
    const all = { url: server.url, name: "w", timeoutMs: 1000, ...options };
    return await assertRejects(() => connectNats(all), FleetError);
  };
  const refuses = async (url: string, code: string, text: string) => {
    const error = await fails({ url });
    assertEquals(error.code, code);
    assertStringIncludes(error.message, text);
  };

  await t.step(
    "a port where nothing listens",
    () => refuses(`ws://127.0.0.1:${freePort()}`, "nats", "ECONNREFUSED"),
  );
  await t.step(
    "a host that is unknown",
    () => refuses("ws://no-such-host.invalid:8080", "nats", "unknown"),
  );
  await t.step(
    "the port of the plain protocol",
    () => refuses(`ws://127.0.0.1:${server.clientPort}`, "nats", "no websocket listener"),
  );
  await t.step("a web server", async () => {
    const web = Deno.serve(
      { port: 0, hostname: "127.0.0.1", onListen() {} },
      () => new Response("not here", { status: 404 }),
    );
    await refuses(`ws://127.0.0.1:${web.addr.port}`, "nats", "no websocket listener");
    await web.shutdown();
  });
  await t.step("a port that never answers", async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = listener.addr as Deno.NetAddr;
    await refuses(`ws://127.0.0.1:${port}`, "nats", "does not answer");
  });
  await t.step(
    "wss where the listener speaks ws",
    () => refuses(server.url.replace("ws:", "wss:"), "nats", "TLS"),
  );
  await t.step(
    "NATS' own protocol in the URL",
    () => refuses("nats://127.0.0.1:4222", "bad-usage", "ws://host:port"),
  );
  await t.step("a password in the URL, which is not repeated", async () => {
    const error = await fails({ url: "ws://me:secret@127.0.0.1:1" });
    assertEquals(error.code, "bad-usage");
    assert(!error.message.includes("secret"));
  });
  await t.step("no credentials", () => refuses(server.url, "unauthorized", "refused"));
  await t.step("wrong credentials, which are not repeated", async () => {
    const credentialsFile = await Deno.makeTempFile();
    await Deno.writeTextFile(credentialsFile, "w:not-the-password\n");
    const error = await fails({ credentialsFile });
    await Deno.remove(credentialsFile);
    assertEquals(error.code, "unauthorized");
    assert(!error.message.includes("not-the-password"));
  });
  await t.step("a credentials file that is not there", async () => {
    assertEquals((await fails({ credentialsFile: "/nowhere/w.auth" })).code, "disk");
  });
  await t.step("a payload bound that is too small", async () => {
    const credentialsFile = server.credentialsFile("coordinator");
    const error = await fails({ credentialsFile, minPayloadBytes: 2 ** 21 });
    assertStringIncludes(error.message, "max_payload");
  });
  await t.step("no JetStream", async () => {
    const link = await connectNats({
      url: server.url,
      name: "coordinator",
      credentialsFile: server.credentialsFile("coordinator"),
    });
    assertEquals(link.user, "coordinator");
    await assertRejects(() => requireJetStream(link.connection), FleetError, "no JetStream");
    await link.bus.close();
  });
});

Deno.test("parseCredentials() knows what a credentials file may hold", () => {
  assertEquals(parseCredentials("user:pass:word\n"), { user: "user", pass: "pass:word" });
  assertEquals(parseCredentials(" a-token \n"), { token: "a-token" });
  const seed = "SU" + "A".repeat(56);
  assertInstanceOf(parseCredentials(seed).authenticator, Function);
  const creds = "-----BEGIN NATS USER JWT-----\nx\n------END NATS USER JWT------\n";
  assertInstanceOf(parseCredentials(creds).authenticator, Function);
  for (const text of ["", "two words"]) {
    assertEquals(assertThrows(() => parseCredentials(text), FleetError).code, "bad-usage");
  }
});
