import { assert, assertEquals, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { sha256Hex, type ShardRef } from "../shared/parts.ts";
import { type CacheOptions, PartCache } from "./cache.ts";

/** A part of shards with these contents; its manifest is JSON of their digests. */
function part(...contents: string[]) {
  const shards = contents.map((content) => {
    const bytes = new TextEncoder().encode(content);
    return { bytes, ref: { digest: sha256Hex(bytes), bytes: bytes.length } };
  });
  const manifest = new TextEncoder().encode(JSON.stringify(shards.map(({ ref }) => ref)));
  return { digest: sha256Hex(manifest), manifest, shards };
}

function shardsOf(manifest: Uint8Array): ShardRef[] {
  return JSON.parse(new TextDecoder().decode(manifest));
}

async function put(cache: PartCache, { digest, manifest, shards }: ReturnType<typeof part>) {
  await cache.putManifest(digest, manifest);
  for (const { ref, bytes } of shards) await cache.putShard(ref.digest, bytes);
}

async function withDirectory(
  body: (directory: string, open: (more?: Partial<CacheOptions>) => Promise<PartCache>) => unknown,
): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "codegemm-fleet-cache-" });
  try {
    await body(
      directory,
      (more) => PartCache.open({ directory, limitBytes: 1e6, shardsOf, ...more }),
    );
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

Deno.test("a part that was put is held, by this process and the next", () =>
  withDirectory(async (directory, open) => {
    const cache = await open();
    const a = part("one", "two");
    assertEquals(await cache.manifest(a.digest), null);
    await put(cache, a);
    for (const other of [cache, await open()]) {
      assertEquals(other.held(), [a.digest]);
      assertEquals(await other.manifest(a.digest), a.manifest);
      assertEquals(other.bytes, 6 + a.manifest.length);
      for (const { ref, bytes } of a.shards) {
        assert(await other.hasShard(ref));
        assertEquals(await Deno.readFile(`${other.shardDirectory}/${ref.digest}`), bytes);
      }
    }
    const names = [...Deno.readDirSync(`${directory}/shards`)].map(({ name }) => name).sort();
    assertEquals(names, a.shards.map(({ ref }) => ref.digest).sort());
  }));

Deno.test("a part whose shards are not all there is not held, and keeps what it has", () =>
  withDirectory(async (_, open) => {
    const a = part("one", "two");
    const cache = await open();
    await cache.putManifest(a.digest, a.manifest);
    await cache.putShard(a.shards[0].ref.digest, a.shards[0].bytes);
    const next = await open();
    assertEquals(next.held(), []);
    assert(await next.hasShard(a.shards[0].ref));
    assert(!await next.hasShard(a.shards[1].ref));
    assertEquals(next.missingBytes({ digest: a.digest, bytes: 6 }), 3);
    assertEquals(next.missingBytes({ digest: "0".repeat(64), bytes: 6 }), 6);
  }));

Deno.test("a file that lies is found out after a restart and removed", () =>
  withDirectory(async (directory, open) => {
    const a = part("one", "two"), b = part("three");
    const cache = await open();
    await put(cache, a);
    await put(cache, b);
    const [shard] = a.shards;
    await Deno.writeTextFile(`${cache.shardDirectory}/${shard.ref.digest}`, "eno");
    await Deno.writeTextFile(`${directory}/parts/${b.digest}`, "[]");
    const next = await open();
    assert(!await next.hasShard(shard.ref));
    assertEquals(
      await Deno.stat(`${next.shardDirectory}/${shard.ref.digest}`).catch(() => null),
      null,
    );
    assertEquals(await next.manifest(b.digest), null);
  }));

Deno.test("bytes that are not their digest's are refused", () =>
  withDirectory(async (_, open) => {
    const cache = await open();
    const a = part("one"), other = new TextEncoder().encode("two");
    await assertRejects(() => cache.putShard(a.shards[0].ref.digest, other), FleetError, "digest");
    await assertRejects(() => cache.putManifest(a.digest, other), FleetError, "digest");
    assertEquals([cache.held(), cache.bytes], [[], 0]);
  }));

Deno.test("a write that fails leaves nothing behind, and a full disk is called one", () =>
  withDirectory(async (directory, open) => {
    const full = Object.assign(new Error("No space left on device (os error 28)"), {
      code: "ENOSPC",
    });
    const cache = await open({
      writeFile: async (path, bytes) => {
        await Deno.writeFile(path, bytes.subarray(0, 1));
        throw full;
      },
    });
    const a = part("one");
    const error = await assertRejects(
      () => cache.putManifest(a.digest, a.manifest),
      FleetError,
      "is full",
    );
    assertEquals(error.code, "disk");
    assertEquals([...Deno.readDirSync(`${directory}/parts`)], []);
    assertEquals(cache.held(), []);
  }));

Deno.test("makeRoom() removes the longest unused parts, never those in use or shared shards", () =>
  withDirectory(async (directory, open) => {
    const a = part("aaaa", "shared"), b = part("bbbb", "shared"), c = part("cccc");
    const filled = await open();
    for (const [order, made] of [c, b, a].entries()) {
      await put(filled, made);
      const past = new Date(Date.now() - 60_000 * order);
      await Deno.utime(`${directory}/parts/${made.digest}`, past, past);
    }
    const limitBytes = filled.bytes + 10;
    const cache = await open({ limitBytes });
    await cache.makeRoom(new Set(), 10);
    assertEquals(cache.held().length, 3);
    // The oldest is a, then b: a is in use, so b goes.
    await cache.makeRoom(new Set([a.digest]), 11);
    assertEquals(cache.held().sort(), [a.digest, c.digest].sort());
    assert(await cache.hasShard(a.shards[1].ref), "a shard that another part names stays");
    assert(!await cache.hasShard(b.shards[0].ref));
    const error = await assertRejects(
      () => cache.makeRoom(new Set([a.digest, c.digest]), limitBytes),
      FleetError,
      "raise --cache-limit",
    );
    assertEquals(error.code, "disk");
  }));

Deno.test("what a crash left behind goes, once it is old", () =>
  withDirectory(async (directory, open) => {
    await open();
    const orphan = `${directory}/shards/${"0".repeat(64)}`;
    const files = [orphan, `${orphan}.half`];
    for (const file of files) await Deno.writeTextFile(file, "x");
    await open();
    assertEquals([...Deno.readDirSync(`${directory}/shards`)].length, 2);
    const old = new Date(Date.now() - 2 * 3_600_000);
    for (const file of files) await Deno.utime(file, old, old);
    const cache = await open();
    assertEquals([...Deno.readDirSync(`${directory}/shards`)], []);
    assertEquals(cache.bytes, 0);
  }));

Deno.test("a directory that cannot be made is an error that names the flag", async () => {
  const open = () =>
    PartCache.open({ directory: "/proc/no/such", limitBytes: 1, shardsOf: () => [] });
  await assertRejects(open, FleetError, "--cache DIR");
});
