/**
 * `deno task bench NAME`: every benchmark of the project by its name, each in a process of its own.
 *
 * @module
 */
import denoJson from "../deno.json" with { type: "json" };
import { FleetError } from "../shared/errors.ts";
import { runCommand } from "../shared/flags.ts";

/** A benchmark: a program, or a file for `deno bench`. */
interface Benchmark {
  file: string;
  runner: "run" | "bench";
  /** What it measures, for the list. */
  what: string;
}

const BENCHMARKS: Record<string, Benchmark> = {
  wire: {
    file: "shared/nats_bus_bench.ts",
    runner: "run",
    what: "a frame's way through a real nats-server on loopback",
  },
  codec: {
    file: "shared/codec_bench.ts",
    runner: "bench",
    what: "encoding and decoding a frame",
  },
  scheduler: {
    file: "coordinator/scheduler_bench.ts",
    runner: "bench",
    what: "scheduler, ledger and codec, per token",
  },
  coordinator: {
    file: "bench/coordinator_bench.ts",
    runner: "run",
    what: "CPU time of the coordinator's process per token, 8 clients over HTTP",
  },
  fleet: {
    file: "bench/fleet_bench.ts",
    runner: "run",
    what: "a whole fleet of real processes: tokens/s, wire, efficiency (--shape, --workers)",
  },
  weights: {
    file: "shared/weights_bench.ts",
    runner: "run",
    what: "weights into the object store and out of it",
  },
  quantize: {
    file: "bench/quantize.ts",
    runner: "run",
    what: "quantizing a layer with calibration: seconds by phase, memory (--shape llama-3-70b)",
  },
  sampling: {
    file: "kernels/sampling/sampler_bench.ts",
    runner: "bench",
    what: "sampling over a vocabulary of 128256",
  },
  model: {
    file: "bench/model.ts",
    runner: "run",
    what: "a worker's stage of synthetic weights: decode, prefill, GPU, CPU (--shape llama-3-70b)",
  },
  kernels: {
    file: "bench/kernels.ts",
    runner: "run",
    what: "the linear kernels, beside the GPU's read bandwidth (--shape llama-3-70b|llama-3-8b)",
  },
};

function listing(): string {
  const width = Math.max(...Object.keys(BENCHMARKS).map((name) => name.length)) + 2;
  const lines = Object.entries(BENCHMARKS).map(([name, { what }]) =>
    `  ${name.padEnd(width)}${what}`
  );
  return ["Usage: deno task bench NAME [flags]", "", ...lines].join("\n");
}

async function main(): Promise<void> {
  const [name, ...flags] = Deno.args;
  if (name === undefined || name === "--help") return console.log(listing());
  const benchmark = BENCHMARKS[name];
  if (!benchmark) throw new FleetError("bad-usage", `There is no benchmark ${name}\n${listing()}`);
  // The very permissions of this task.
  const permissions = denoJson.tasks.bench.split(/\s+/).filter((word) =>
    word.startsWith("--allow")
  );
  const { file, runner } = benchmark;
  const { code } = await new Deno.Command(Deno.execPath(), {
    args: [runner, "-q", "--no-prompt", ...permissions, file, ...flags],
    cwd: new URL("../", import.meta.url).pathname,
  }).spawn().status;
  Deno.exit(code);
}

if (import.meta.main) await runCommand(main);
