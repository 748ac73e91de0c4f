import { assert, assertEquals, assertRejects } from "@std/assert";
import { randomModel, tinyConfig } from "../model/testing/random_model.ts";
import { encodeSafetensors, memorySource, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { type DescribedPart, describeParts, parsePartManifest, readPart } from "../shared/parts.ts";
import { PartCache } from "./cache.ts";
import { PartLibrary } from "./part_library.ts";
import { openParts } from "./part_location.ts";
import type { PartProgress } from "./worker.ts";

async function checkpointOf(seed: number) {
  const model = randomModel(tinyConfig({ layers: 2 }), seed);
  const tensors = await Promise.all(
    model.names().map(async (name) => {
      const info = model.info(name);
      return { ...info, data: await model.read(name, 0, info.bytes) };
    }),
  );
  return {
    "config.json": new TextEncoder().encode(model.configJson),
    "model.safetensors": encodeSafetensors(tensors),
  };
}

/** A library over an empty cache and a store that has a model, with a checkpoint on disk or not. */
class Scene {
  readonly directory: string;
  readonly parts: DescribedPart[];
  readonly library: PartLibrary;
  readonly fetched: string[] = [];
  readonly log: string[] = [];
  readonly progress: PartProgress[] = [];

  private constructor(directory: string, parts: DescribedPart[], library: PartLibrary) {
    this.directory = directory;
    this.parts = parts;
    this.library = library;
  }

  static async open(
    directory: string,
    options: { onDisk?: number; limitBytes?: number } = {},
  ): Promise<Scene> {
    const stored = await openCheckpoint(memorySource(await checkpointOf(1)));
    const { parts } = await describeParts(stored);
    const cache = await PartCache.open({
      directory: `${directory}/cache`,
      limitBytes: options.limitBytes ?? 1e9,
      shardsOf: (manifest) => parsePartManifest(manifest).shards,
    });
    let onDisk;
    if (options.onDisk !== undefined) {
      const files = await checkpointOf(options.onDisk);
      await Deno.mkdir(`${directory}/model`, { recursive: true });
      for (const [name, bytes] of Object.entries(files)) {
        await Deno.writeFile(`${directory}/model/${name}`, bytes);
      }
      const checkpoint = await openCheckpoint(memorySource(files));
      onDisk = { directory: `${directory}/model`, checkpoint };
    }
    const library = new PartLibrary({
      cache,
      checkpoint: onDisk,
      log: (line) => scene.log.push(line),
      async fetch({ digest }, onProgress) {
        const { ref, manifest, json } = parts.find(({ ref }) => ref.digest === digest)!;
        if (!await cache.manifest(digest)) await cache.putManifest(digest, json);
        let doneBytes = 0, at = 0;
        const missing = [];
        for (const shard of manifest.shards) {
          if (await cache.hasShard(shard)) doneBytes += shard.bytes;
          else missing.push({ ...shard, at });
          at += shard.bytes;
        }
        onProgress({ doneBytes, totalBytes: ref.bytes });
        for (const shard of missing) {
          scene.fetched.push(ref.part);
          const slices = await Array.fromAsync(readPart(stored, manifest, shard.at, shard.bytes));
          await cache.putShard(shard.digest, new Uint8Array(await new Blob(slices).arrayBuffer()));
          onProgress({ doneBytes: doneBytes += shard.bytes, totalBytes: ref.bytes });
        }
        return manifest;
      },
    });
    const scene = new Scene(directory, parts, library);
    return scene;
  }

  provide(parts = this.parts, signal = new AbortController().signal) {
    const refs = parts.map(({ ref }) => ref);
    return this.library.provide(refs, (progress) => this.progress.push(progress), signal);
  }
}

async function withDirectory(test: (directory: string) => Promise<void>): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "codegemm-fleet-library-" });
  try {
    await test(directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

const names = ["embedding", "layer.0", "layer.1", "head"];

Deno.test("parts are fetched once, and read from the cache then", () =>
  withDirectory(async (directory) => {
    const first = await Scene.open(directory);
    await first.provide();
    assertEquals(first.fetched, names);
    assertEquals(first.progress.map(({ from }) => from).slice(0, 2), ["cache", "store"]);
    const next = await Scene.open(directory);
    assertEquals(next.library.held().length, 4);
    const locations = await next.provide();
    assertEquals([next.fetched, locations.map(({ from }) => from)], [[], names.map(() => "cache")]);
    assertEquals(new Set(next.progress.map(({ from }) => from)), new Set(["cache"]));
    const model = randomModel(tinyConfig({ layers: 2 }), 1);
    for (const { tensors } of await openParts(locations)) {
      for (const name of tensors.names()) {
        const { bytes } = model.info(name);
        assertEquals(await tensors.read(name, 0, bytes), await model.read(name, 0, bytes), name);
      }
    }
  }));

Deno.test("a checkpoint on disk is read in place when its digests are right", () =>
  withDirectory(async (directory) => {
    const scene = await Scene.open(directory, { onDisk: 1 });
    const locations = await scene.provide();
    assertEquals([scene.fetched, locations.map(({ from }) => from)], [[], names.map(() => "disk")]);
    assertEquals(scene.library.held().sort(), scene.parts.map(({ ref }) => ref.digest).sort());
    const opened = await openParts(locations);
    assertEquals(new Set(opened).size, 1);
    assert(opened[0].tensors.has("lm_head.weight"));
  }));

Deno.test("another checkpoint on disk is left alone, and the reason is told", () =>
  withDirectory(async (directory) => {
    const scene = await Scene.open(directory, { onDisk: 2 });
    const locations = await scene.provide();
    assertEquals([...new Set(locations.map(({ from }) => from))], ["cache"]);
    assertEquals(scene.fetched, names);
    assert(scene.log.some((line) => line.includes("--model has another layer.0")));
  }));

Deno.test("parts of an earlier stage make room for those of the next", () =>
  withDirectory(async (directory) => {
    const [embedding, layer0, layer1, head] = (await Scene.open(directory)).parts;
    const limitBytes = layer0.ref.bytes * 2 + 8192;
    const scene = await Scene.open(directory, { limitBytes });
    await scene.provide([layer0]);
    await scene.provide([layer1]);
    assertEquals(scene.library.held().length, 2);
    await scene.provide([layer1, embedding]);
    const held = [layer1, embedding].map(({ ref }) => ref.digest).sort();
    assertEquals(scene.library.held().sort(), held);
    await assertRejects(
      () => scene.provide([embedding, layer0, layer1, head]),
      FleetError,
      "--cache-limit",
    );
  }));

Deno.test("a provision that is called off ends", () =>
  withDirectory(async (directory) => {
    const scene = await Scene.open(directory);
    const error = new FleetError("cancelled", "a newer order came");
    await assertRejects(
      () => scene.provide(scene.parts, AbortSignal.abort(error)),
      FleetError,
      "newer order",
    );
  }));
