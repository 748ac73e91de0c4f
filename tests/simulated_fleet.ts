/**
 * A whole fleet in one process and in simulated time: the real coordinator and the real workers on a
 * bus that may lose, delay and double, with integer arithmetic in place of the model.
 *
 * @module
 */
import { invariant } from "../shared/errors.ts";
import { type Clock, VirtualClock } from "../shared/clock.ts";
import { type GenerateEvent, type GenerateRequest, PLAIN_REQUEST } from "../coordinator/engine.ts";
import { Fleet, type FleetModel, type FleetOptions } from "../coordinator/fleet.ts";
import type { Bus } from "../shared/bus.ts";
import type { RowResult, StepBatch } from "../shared/frames.ts";
import { LIMITS } from "../shared/limits.ts";
import { type MemoryBus, MemoryHub } from "../shared/memory_bus.ts";
import { parseModelConfig } from "../shared/checkpoint/mod.ts";
import { stageParts } from "../shared/model_config.ts";
import { PROTOCOL_VERSION, subjects } from "../shared/protocol.ts";
import type { RunnerOutput, StageRunner } from "../worker/stage.ts";
import { FleetWorker } from "../worker/worker.ts";

/** Prefix of a simulated fleet's subjects. */
export const PREFIX = "sim";
const VOCAB = 1000;
const HIDDEN = 16;

/** `config.json` of the simulated model. */
export const CONFIG_JSON = JSON.stringify({
  model_type: "llama",
  hidden_size: HIDDEN,
  num_hidden_layers: 8,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  head_dim: 8,
  intermediate_size: 32,
  vocab_size: VOCAB,
  max_position_embeddings: 512,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  tie_word_embeddings: false,
  bos_token_id: 0,
  eos_token_id: 1,
});

const hex = (n: number) => n.toString(16).padStart(64, "0");

/** The simulated model, as a fleet serves it. */
export function simulatedModel(): FleetModel {
  const config = parseModelConfig(CONFIG_JSON);
  const parts = stageParts({ from: 0, to: config.layers, first: true, last: true })
    .map((part, index) => ({ part, digest: hex(index), bytes: 10_000 }));
  return {
    id: "simulated",
    createdUnix: 0,
    format: "float16",
    config,
    configJson: CONFIG_JSON,
    digest: hex(99),
    parts,
  };
}

/** How a simulated worker differs from an honest and capable one. */
export interface Temper {
  memoryBytes?: number;
  /** What it loads in place of the honest stage. */
  load?: (honest: StageRunner) => Promise<StageRunner>;
}

/** A worker whose GPU is a {@linkcode SimulatedStage}. */
export function simulatedWorker(
  options: {
    bus: Bus;
    clock: Clock;
    prefix: string;
    name: string;
    instance: string;
    stepMs: number;
  } & Temper,
): FleetWorker<null> {
  const { bus, clock, prefix, name, instance, stepMs } = options;
  const load = options.load ?? ((honest: StageRunner) => Promise.resolve(honest));
  return new FleetWorker<null>({
    bus,
    clock,
    subjects: subjects(prefix),
    card: {
      version: PROTOCOL_VERSION,
      worker: name,
      instance,
      host: "simulation",
      gpu: { name: "integers", software: true },
      memoryBytes: options.memoryBytes ?? 2 ** 30,
      maxBindingBytes: 2 ** 27,
      selfTestDigest: hex(1),
      calibration: {
        denseBytesPerMs: 1e6,
        codegemmBytesPerMs: 1e6,
        wideCodeBytesPerMs: 1e6,
        overheadMsPerLayer: 1,
      },
    },
    parts: {
      held: () => [],
      provide: (parts) => Promise.resolve(parts.map(() => null)),
    },
    loader: {
      load: async ({ stage }) => ({
        runner: await load(new SimulatedStage(clock, stepMs, stage)),
        memoryBytes: 0,
        destroy: () => Promise.resolve(),
      }),
    },
  });
}

/** FNV-1a over u32 words. */
function hash(...words: number[]): number {
  let h = 0x811c9dc5;
  for (const word of words) h = Math.imul(h ^ word, 0x01000193) >>> 0;
  return h;
}

/**
 * A run of layers of integer arithmetic. In each layer every row writes what came in to its slot of
 * its page, then puts out a hash of all slots of its sequence up to its own: a page that is wrong,
 * stale or somebody else's changes every token after it.
 */
export class SimulatedStage implements StageRunner {
  /** Per layer: what stands in each position of each page. */
  readonly #layers: Map<number, number>[];
  readonly #clock: Clock;
  readonly #stepMs: number;
  readonly #last: boolean;
  #tail: Promise<unknown> = Promise.resolve();

  constructor(
    clock: Clock,
    stepMs: number,
    stage: { from: number; to: number; last: boolean },
  ) {
    this.#layers = Array.from({ length: stage.to - stage.from }, () => new Map());
    this.#clock = clock;
    this.#stepMs = stepMs;
    this.#last = stage.last;
  }

  run(batch: StepBatch, hidden: Uint16Array | null): Promise<RunnerOutput> {
    const output = this.#tail.then(() => this.#step(batch, hidden));
    this.#tail = output.catch(() => {});
    return output;
  }

  async #step(batch: StepBatch, hidden: Uint16Array | null): Promise<RunnerOutput> {
    const startedAtMs = this.#clock.unixMs();
    await new Promise<void>((resolve) => this.#clock.after(this.#stepMs, resolve));
    let rows = Array.from(batch.rowToken, (token, row) => hidden ? hidden[row * HIDDEN] : token);
    for (const slots of this.#layers) rows = layer(batch, slots, rows);
    const output = new Uint16Array(rows.length * HIDDEN);
    rows.forEach((value, row) => output[row * HIDDEN] = value);
    return {
      startedAtMs,
      gpuMs: this.#stepMs,
      readbackMs: 0,
      hidden: this.#last ? null : output,
      results: this.#last
        ? batch.requests.map((request) => this.#result(request, rows, batch))
        : [],
    };
  }

  #result(request: StepBatch["requests"][number], sums: number[], batch: StepBatch): RowResult {
    invariant(request.type === "sample", "the fleet only samples");
    const { row, sampling } = request;
    const key = sampling.temperature === 0 ? [] : [sampling.seedLow, sampling.choice];
    const token = 2 + hash(sums[row], batch.rowPosition[row], ...key) % (VOCAB - 2);
    return {
      type: "sample",
      row,
      token,
      logprob: -1,
      alternativeTokens: new Uint32Array(0),
      alternativeLogprobs: new Float32Array(0),
    };
  }
}

function layer(batch: StepBatch, slots: Map<number, number>, rows: number[]): number[] {
  const slotOf = (row: number, position: number) => {
    const { pages } = batch.sequences[batch.rowSequence[row]];
    return pages[Math.floor(position / LIMITS.pageTokens)] * LIMITS.pageTokens +
      position % LIMITS.pageTokens;
  };
  rows.forEach((value, row) => slots.set(slotOf(row, batch.rowPosition[row]), value));
  return rows.map((_, row) => {
    let sum = 0;
    for (let position = 0; position <= batch.rowPosition[row]; position++) {
      const value = slots.get(slotOf(row, position));
      invariant(value !== undefined, `position ${position} was never written`);
      sum = hash(sum, value);
    }
    return sum & 0xffff;
  });
}

/** A worker of the simulation. */
export interface SimulatedWorker {
  name: string;
  bus: MemoryBus;
  worker: FleetWorker<null>;
}

/** How the simulation is set up. */
export interface SimulationOptions {
  seed?: number;
  stepMs?: number;
  hopMs?: number;
  /** Is given the coordinator's end of the bus. */
  onBus?: (bus: MemoryBus) => void;
  fleet?: Partial<FleetOptions>;
}

/** A fleet in simulated time. Move it on with {@linkcode run} and {@linkcode until}. */
export class SimulatedFleet {
  readonly clock = new VirtualClock();
  readonly hub: MemoryHub;
  readonly fleet: Fleet;
  readonly log: string[] = [];
  readonly workers = new Map<string, SimulatedWorker>();
  readonly #stepMs: number;
  #instances = 0;
  #epoch = 0;

  constructor(options: SimulationOptions = {}) {
    this.#stepMs = options.stepMs ?? 10;
    this.hub = new MemoryHub({
      clock: this.clock,
      seed: options.seed ?? 1,
      latencyMs: options.hopMs ?? 1,
    });
    const bus = this.hub.connect("coordinator");
    options.onBus?.(bus);
    this.fleet = new Fleet({
      bus,
      clock: this.clock,
      prefix: PREFIX,
      model: simulatedModel(),
      nextEpoch: () => Promise.resolve(++this.#epoch),
      contextTokens: 256,
      sequences: 16,
      objective: "throughput",
      stages: null,
      profile: { version: 1, decode: "codegemm" },
      log: ({ text }) => this.log.push(text),
      ...options.fleet,
    });
    this.fleet.start();
  }

  /** Adds a worker; one of a known name replaces the process of that name. */
  join(name: string, temper: Temper = {}): SimulatedWorker {
    const bus = this.hub.connect(name);
    const worker = simulatedWorker({
      bus,
      clock: this.clock,
      prefix: PREFIX,
      name,
      instance: `${name}-${this.#instances++}`,
      stepMs: this.#stepMs,
      ...temper,
    });
    worker.join();
    const simulated = { name, bus, worker };
    this.workers.set(name, simulated);
    return simulated;
  }

  /** Kills a worker: from now on it neither hears nor says anything. */
  kill(name: string): void {
    const { bus, worker } = this.workers.get(name)!;
    bus.cut();
    worker.close();
    this.workers.delete(name);
  }

  /** Lets `forMs` of simulated time pass. */
  async run(forMs: number): Promise<void> {
    const endMs = this.clock.nowMs() + forMs;
    await this.until(() => this.clock.nowMs() >= endMs);
  }

  /** Lets time pass until `condition` holds; fails after ten simulated minutes. */
  async until(condition: () => boolean): Promise<void> {
    const endMs = this.clock.nowMs() + 600_000;
    while (!condition()) {
      invariant(this.clock.nowMs() < endMs, `the simulation hangs:\n${this.log.join("\n")}`);
      this.clock.step();
      await settle();
    }
  }

  /** Runs requests to their ends; returns each one's tokens, or the error it failed with. */
  async generate(requests: Partial<GenerateRequest>[]): Promise<(number[] | Error)[]> {
    const streams = requests.map((request) => this.start(request));
    await this.until(() => streams.every((stream) => stream.ended));
    return streams.map((stream) => stream.error ?? stream.tokens);
  }

  /** Starts a request and collects what it yields. */
  start(request: Partial<GenerateRequest>): Collected {
    const abort = new AbortController();
    const collected: Collected = { tokens: [], ended: false, error: null, abort };
    const events = this.fleet.generate({ ...REQUEST, ...request }, abort.signal);
    collect(events, collected);
    return collected;
  }
}

/** What a request has yielded so far. */
export interface Collected {
  tokens: number[];
  ended: boolean;
  error: Error | null;
  abort: AbortController;
}

async function collect(events: AsyncIterable<GenerateEvent>, into: Collected): Promise<void> {
  try {
    for await (const event of events) if (event.type === "token") into.tokens.push(event.token);
  } catch (error) {
    into.error = error as Error;
  }
  into.ended = true;
}

const REQUEST: GenerateRequest = {
  ...PLAIN_REQUEST,
  promptTokens: Uint32Array.of(0, 5, 9),
  maxTokens: 20,
};

/** Lets every promise that can settle do so. */
async function settle(): Promise<void> {
  for (let i = 0; i < 12; i++) await Promise.resolve();
}
