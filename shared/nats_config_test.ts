import { assert, assertEquals, assertRejects } from "@std/assert";
import { Events } from "nats.ws";
import { startNatsServer, type TestServer } from "../tests/nats_server.ts";
import { FleetError } from "./errors.ts";
import { connectNats, type NatsLink } from "./nats_bus.ts";
import { DISCONNECT_SUBJECT } from "./nats_config.ts";
import { ObjectStore } from "./object_store.ts";
import { describePart, sha256Hex } from "./parts.ts";
import { tinyCheckpoint } from "./parts_fixture.ts";
import { subjects } from "./protocol.ts";
import { fetchPart, type PartStore } from "./weights.ts";

const FLEET = subjects("test");
const NOTHING = new Uint8Array();

function connectAs(server: TestServer, name: string): Promise<NatsLink> {
  return connectNats({ url: server.url, name, credentialsFile: server.credentialsFile(name) });
}

/** Runs `fn` without the lines in which the bus reports refusals. */
async function quietly<T>(fn: () => Promise<T>): Promise<T> {
  const { error } = console;
  console.error = () => {};
  try {
    return await fn();
  } finally {
    console.error = error;
  }
}

/** Whether the server refuses `action`, by its own word. */
function refused(link: NatsLink, action: () => void): Promise<boolean> {
  return quietly(async () => {
    let violations = 0;
    const status = link.connection.status();
    const watching = (async () => {
      for await (const { type, data } of status) {
        if (type === Events.Error && data === "PERMISSIONS_VIOLATION") violations++;
      }
    })();
    action();
    // The server's refusal comes before its answer to the ping behind it.
    await link.connection.flush();
    await link.connection.flush();
    (status as unknown as { stop(): void }).stop();
    await watching;
    return violations > 0;
  });
}

Deno.test("a worker speaks in its own name only, by the real server's word", async (t) => {
  await using server = await startNatsServer({ workers: ["w1", "w2"] });
  const coordinator = await connectAs(server, "coordinator");
  const [w1, w2] = [await connectAs(server, "w1"), await connectAs(server, "w2")];
  assertEquals(w1.user, "w1");
  const publishes = async (link: NatsLink, subject: string) =>
    !await refused(link, () => link.bus.publish(subject, NOTHING));
  const subscribes = async (link: NatsLink, pattern: string) =>
    !await refused(link, () => link.bus.subscribe(pattern, () => {}));

  await t.step("what it may publish", async () => {
    for (
      const subject of [
        FLEET.hello("w1"),
        FLEET.beat("w1"),
        FLEET.report("w1"),
        FLEET.step("w2", "w1", 7),
        FLEET.step("coordinator", "w1", 7),
      ]
    ) assert(await publishes(w1, subject), subject);
  });

  await t.step("what it may not publish", async () => {
    for (
      const subject of [
        FLEET.hello("w2"),
        FLEET.beat("w2"),
        FLEET.report("w2"),
        FLEET.ctl("w2"),
        FLEET.call,
        FLEET.step("w2", "coordinator", 7),
        FLEET.step("w1", "w2", 7),
        "_INBOX.coordinator.x",
        `$O.${FLEET.bucket}.C.x`,
        `$O.${FLEET.bucket}.M.x`,
        `$KV.${FLEET.state}.lease`,
        `$JS.API.STREAM.DELETE.OBJ_${FLEET.bucket}`,
        `$JS.API.STREAM.PURGE.OBJ_${FLEET.bucket}`,
        `$JS.API.DIRECT.GET.KV_${FLEET.state}`,
        "elsewhere",
      ]
    ) assert(!await publishes(w1, subject), subject);
  });

  await t.step("what it may hear", async () => {
    for (const pattern of [FLEET.call, FLEET.ctl("w1"), "test.step.w1.>", "test.step.w1.*.*"]) {
      assert(await subscribes(w1, pattern), pattern);
    }
    for (
      const pattern of [
        FLEET.ctl("w2"),
        "test.step.w2.>",
        "test.step.>",
        FLEET.beat("*"),
        "_INBOX.>",
        "_INBOX.w2.>",
        DISCONNECT_SUBJECT,
        ">",
      ]
    ) assert(!await subscribes(w1, pattern), pattern);
  });

  await t.step("it answers control requests", async () => {
    w2.bus.subscribe(FLEET.ctl("w2"), ({ respond }) => respond!(Uint8Array.of(1)));
    await w2.bus.flush();
    const answer = await coordinator.bus.request(FLEET.ctl("w2"), NOTHING, 2000);
    assertEquals(answer, Uint8Array.of(1));
  });

  await t.step("it fetches weights, and cannot put any", async () => {
    const { bucket } = FLEET;
    const { connection } = coordinator;
    const checkpoint = await tinyCheckpoint();
    const { ref, manifest, json } = await describePart(checkpoint, "layer.0");
    const store = new ObjectStore({ connection, bucket });
    await store.ensure();
    await store.write(ref.digest, [json], ref.digest);
    const [shard] = manifest.shards;
    const bytes = new Uint8Array(shard.bytes);
    for (const { name, offset, bytes: length } of manifest.tensors) {
      bytes.set(await checkpoint.read(name, 0, length), offset);
    }
    await store.write(shard.digest, [bytes], shard.digest);

    const fetched = new Map<string, Uint8Array>();
    const sink: PartStore = {
      manifest: () => Promise.resolve(null),
      putManifest: () => Promise.resolve(),
      hasShard: () => Promise.resolve(false),
      putShard: (digest, bytes) => Promise.resolve(void fetched.set(digest, bytes)),
    };
    await fetchPart({ connection: w1.connection, bucket, part: ref, store: sink });
    assertEquals(fetched.get(shard.digest), bytes);

    const worker = new ObjectStore({ connection: w1.connection, bucket, requestTimeoutMs: 500 });
    const put = () => quietly(() => worker.write("mine", [bytes], sha256Hex(bytes)));
    assertEquals((await assertRejects(put, FleetError)).code, "unauthorized");
  });

  await t.step("the coordinator hears at once when a worker is gone", async () => {
    const gone = Promise.withResolvers<{ client: { name: string; user: string } }>();
    coordinator.bus.subscribe(
      DISCONNECT_SUBJECT,
      ({ data }) => gone.resolve(JSON.parse(new TextDecoder().decode(data))),
    );
    await coordinator.bus.flush();
    await w2.bus.close();
    const { client } = await gone.promise;
    assertEquals([client.name, client.user], ["w2", "w2"]);
  });

  await w1.bus.close();
  await coordinator.bus.close();
});

Deno.test("an open server tells of disconnected clients, too", async () => {
  await using server = await startNatsServer();
  const coordinator = await connectNats({ url: server.url, name: "coordinator" });
  const worker = await connectNats({ url: server.url, name: "w" });
  const gone = Promise.withResolvers<{ client: { name: string } }>();
  coordinator.bus.subscribe(
    DISCONNECT_SUBJECT,
    ({ data }) => gone.resolve(JSON.parse(new TextDecoder().decode(data))),
  );
  await coordinator.bus.flush();
  await worker.bus.close();
  assertEquals((await gone.promise).client.name, "w");
  await coordinator.bus.close();
});
