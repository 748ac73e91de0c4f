import { assert, assertEquals } from "@std/assert";
import { type GenerateRequest, PLAIN_REQUEST } from "../coordinator/engine.ts";
import { Fleet } from "../coordinator/fleet.ts";
import { Gpu } from "../kernels/mod.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { type Checkpoint, openCheckpoint } from "../shared/checkpoint/mod.ts";
import { systemClock } from "../shared/clock.ts";
import { type BusFaults, MemoryHub } from "../shared/memory_bus.ts";
import { describeParts, type ModelManifest } from "../shared/parts.ts";
import { PROTOCOL_VERSION, subjects } from "../shared/protocol.ts";
import { createTokenizer } from "../shared/tokenizer.ts";
import { ModelLoader } from "../worker/model_loader.ts";
import { FleetWorker } from "../worker/worker.ts";

const DEMO = new URL("../models/story-16m-m1v4g128", import.meta.url).pathname;
const PREFIX = "real";

/** A fleet in one process with the demo model on the real kernels. */
interface RealFleet extends AsyncDisposable {
  fleet: Fleet;
  hub: MemoryHub;
}

async function realFleet(
  gpu: Gpu,
  checkpoint: Checkpoint,
  manifest: ModelManifest,
  stages: number,
): Promise<RealFleet> {
  const hub = new MemoryHub({ clock: systemClock, seed: 7 });
  let epoch = 0;
  const fleet = new Fleet({
    bus: hub.connect("coordinator"),
    clock: systemClock,
    prefix: PREFIX,
    model: {
      id: "demo",
      createdUnix: 0,
      format: "m1v4g128",
      config: checkpoint.config,
      configJson: checkpoint.configJson,
      digest: manifest.digest,
      parts: manifest.parts.map(({ ref }) => ref),
    },
    nextEpoch: () => Promise.resolve(++epoch),
    contextTokens: 256,
    sequences: 8,
    objective: "throughput",
    stages,
    profile: { version: 1, decode: "codegemm" },
    log: () => {},
  });
  const workers = Array.from({ length: stages }, (_, index) => {
    const worker = new FleetWorker({
      bus: hub.connect(`w${index}`),
      clock: systemClock,
      subjects: subjects(PREFIX),
      card: {
        version: PROTOCOL_VERSION,
        worker: `w${index}`,
        instance: `i${index}`,
        host: "test",
        gpu: gpu.info,
        memoryBytes: 2 ** 30,
        maxBindingBytes: gpu.limits.maxStorageBufferBindingSize,
        selfTestDigest: "0".repeat(64),
        calibration: {
          denseBytesPerMs: 1e6,
          codegemmBytesPerMs: 1e6,
          wideCodeBytesPerMs: 1e6,
          overheadMsPerLayer: 1,
        },
      },
      parts: {
        held: () => [],
        provide: (parts) =>
          Promise.resolve(parts.map(() => ({ from: "disk" as const, tensors: checkpoint }))),
      },
      loader: new ModelLoader(gpu, systemClock),
    });
    worker.join();
    return worker;
  });
  const { promise: serving, resolve } = Promise.withResolvers<void>();
  const stopWaiting = fleet.onChange(() => fleet.snapshot().state === "serving" && resolve());
  fleet.start();
  await serving;
  stopWaiting();
  return {
    fleet,
    hub,
    async [Symbol.asyncDispose]() {
      await fleet.stop();
      for (const worker of workers) worker.close();
    },
  };
}

/** Greedy and sampled, long and short, with and without penalties and nucleus. */
function mixedRequests(encode: (text: string) => Uint32Array): GenerateRequest[] {
  const texts = [
    "Once upon a time",
    "The fox said to the crow, ",
    `${"It was a dark night. ".repeat(8)}Then`,
  ];
  return texts.flatMap((text, i) => [
    { ...PLAIN_REQUEST, promptTokens: encode(text), maxTokens: 8 + i },
    {
      ...PLAIN_REQUEST,
      promptTokens: encode(text),
      maxTokens: 6 + 2 * i,
      temperature: 0.9,
      topP: i % 2 ? 0.9 : 1,
      seed: BigInt(i) << 40n,
      choice: i,
      presencePenalty: i === 2 ? 0.6 : 0,
      frequencyPenalty: i === 0 ? 0.4 : 0,
      bias: i === 1 ? new Map([[11, -3]]) : new Map(),
      alternatives: i,
    },
  ]);
}

/** Tokens and the exact bits of their log-probabilities. */
async function streamOf(fleet: Fleet, request: GenerateRequest): Promise<string[]> {
  const events: string[] = [];
  for await (const event of fleet.generate(request, new AbortController().signal)) {
    events.push(JSON.stringify(event));
  }
  return events;
}

Deno.test("the demo model's streams are byte-identical on 1 to 4 stages, alone, together, and on a bad bus", async () => {
  const gpu = await Gpu.open({ software: true });
  const checkpoint = await openCheckpoint(directorySource(DEMO));
  const manifest = await describeParts(checkpoint);
  const tokenizer = createTokenizer(checkpoint.tokenizerJson!, checkpoint.tokenizerConfigJson);
  const requests = mixedRequests((text) => tokenizer.encode(text, { addSpecialTokens: true }));
  const expected: string[][] = [];
  try {
    {
      await using alone = await realFleet(gpu, checkpoint, manifest, 1);
      for (const request of requests) expected.push(await streamOf(alone.fleet, request));
    }
    assertEquals(expected.map((events) => events.length), requests.map((r) => r.maxTokens + 1));
    assert(new Set(expected.map(String)).size === expected.length, "requests differ");
    const bad: BusFaults = {
      lose: 0.02,
      double: 0.05,
      delay: 0.05,
      maxDelayMs: 20,
      subject: (subject) => subject.includes(".step."),
    };
    for (const [stages, faults] of [[2, null], [3, bad], [4, null]] as const) {
      await using together = await realFleet(gpu, checkpoint, manifest, stages);
      together.hub.faults = faults;
      const streams = await Promise.all(requests.map((r) => streamOf(together.fleet, r)));
      assertEquals(streams, expected, `${stages} stages`);
    }
  } finally {
    gpu.close();
  }
});
