/**
 * A whole fleet on this machine: real processes, a real nats-server, a model of random weights in the
 * shape of a real one. Tokens per second against the number of sequences, the wire's share of a hop,
 * and what the pipeline loses against its stages alone.
 *
 * With several GPUs each worker gets one of its own (as root, on Linux with NVIDIA's driver: WebGPU
 * always takes the first GPU that it sees, so the others are hidden from the process).
 *
 * @module
 */
import denoJson from "../deno.json" with { type: "json" };
import { type Child, startChild, taskArgs } from "../cli/processes.ts";
import type { FleetSnapshot } from "../coordinator/snapshot.ts";
import { parseFormatName } from "../shared/checkpoint/mod.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { freePort } from "../cli/ports.ts";
import { startNatsServer } from "../tests/nats_server.ts";
import { type ShapeName, SHAPES, writeSyntheticCheckpoint } from "./synthetic_checkpoint.ts";

const ROOT = new URL("../", import.meta.url);
const DEMO = new URL("models/", ROOT);
const PREFIX = "test";
/** Tokens of each answer; the first ones, until all sequences run, are part of it. */
const DEFAULT_TOKENS = 64;

const COMMAND = {
  command: "bench fleet",
  summary: "Tokens per second of a whole fleet on this machine.",
  flags: {
    shape: { type: "string", default: "llama-3-8b", help: Object.keys(SHAPES).join(", ") },
    layers: { type: "integer", min: 1, help: "fewer layers than the shape has" },
    format: { type: "string", default: "m1v4g128", help: "m1v4g128, m1v8b16 (AQLM's 1x16), ..." },
    workers: { type: "integer", default: 2, min: 1, max: 16, help: "stages, a process each" },
    sequences: { type: "string", default: "1,4,16,32", help: "clients at once" },
    tokens: { type: "integer", default: DEFAULT_TOKENS, min: 4, help: "tokens of an answer" },
    context: { type: "integer", default: 1024, min: 64, help: "longest sequence" },
    software: { type: "boolean", help: "on software adapters" },
    memory: { type: "string", help: "GPU memory per worker, e.g. 40GiB; needed with --gpus" },
    gpus: { type: "integer", default: 1, min: 1, help: "give each worker one of so many GPUs" },
    verbose: { type: "boolean", help: "show what the processes print" },
    out: { type: "path", help: "a file for the figures as JSON" },
  },
} as const;

type Values = ReturnType<typeof parseFlags<typeof COMMAND.flags>>["values"];

/** Figures of one number of clients. */
interface Measurement {
  sequences: number;
  tokensPerSecond: number;
  /** Time between two tokens of a sequence, prompts and ramps included. */
  tokenMs: number;
  /** Median per hop over the last 512 steps, ms. */
  wireMs: number[];
  gpuMs: number[];
  busy: (number | null)[];
}

/** A fleet of `stages` workers that serve the checkpoint in `model`. */
async function withFleet<T>(
  model: string,
  stages: number,
  values: Values,
  use: (url: string) => Promise<T>,
): Promise<T> {
  await using nats = await startNatsServer({ prefix: PREFIX, maxStoreBytes: 64 * 2 ** 30 });
  const apiPort = freePort(), children: Child[] = [];
  const url = `http://127.0.0.1:${apiPort}`;
  const onLine = (name: string, line: string) => values.verbose && console.log(`${name}: ${line}`);
  const common = ["--nats", nats.url, "--prefix", PREFIX, "--model", model];
  try {
    children.push(startChild({
      name: "coordinator",
      command: Deno.execPath(),
      args: [
        ...taskArgs(denoJson.tasks, "coordinator"),
        ...[...common, "--name", "synthetic", "--port", String(apiPort)],
        ...["--no-upload", "--stages", String(stages), "--context", String(values.context)],
        ...["--sequences", String(Math.max(...clients(values)))],
      ],
      cwd: ROOT.pathname,
      onLine,
    }));
    for (let i = 0; i < stages; i++) {
      const args = [
        ...taskArgs(denoJson.tasks, "worker"),
        ...[...common, "--name", `worker-${i}`, ...(values.software ? ["--software"] : [])],
        ...(values.memory ? ["--memory", values.memory] : []),
      ];
      children.push(
        startChild({ name: `worker-${i}`, ...onGpu(i % values.gpus, values.gpus, args), onLine }),
      );
    }
    await untilReady(url, children);
    return await use(url);
  } finally {
    await Promise.all(children.map((child) => child.stop()));
  }
}

/** The command that runs Deno with one GPU of several in sight. */
function onGpu(index: number, gpus: number, args: string[]) {
  const cwd = ROOT.pathname, deno = Deno.execPath();
  if (gpus === 1) return { command: deno, args, cwd };
  const hide = Array.from({ length: gpus }, (_, i) => i)
    .filter((i) => i !== index)
    .map((i) => `mount --bind /dev/null /dev/nvidia${i}`);
  const script = [...hide, `exec "$0" "$@"`].join(" && ");
  return { command: "unshare", args: ["-m", "sh", "-c", script, deno, ...args], cwd };
}

async function untilReady(url: string, children: readonly Child[]): Promise<void> {
  let ended: string | null = null;
  for (const child of children) child.ended.then(({ code }) => ended ??= `${child.name} (${code})`);
  while (!await fetch(`${url}/readyz`).then(async (r) => (await r.text(), r.ok), () => false)) {
    if (ended) throw new FleetError("unavailable", `${ended} ended; --verbose shows why`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

const clients = (values: Values) => values.sequences.split(",").map(Number);

/** Answers to `sequences` clients at once. */
async function measure(url: string, sequences: number, tokens: number): Promise<Measurement> {
  const ask = async (client: number) => {
    const response = await fetch(`${url}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        model: "synthetic",
        prompt: [0, 2 + client, 3, 4],
        max_tokens: tokens,
        stream: true,
        temperature: 1,
        seed: client,
        // The end of a sequence would end the measurement.
        logit_bias: { 1: -100 },
      }),
    });
    const text = await response.text();
    if (!text.includes("[DONE]")) throw new FleetError("internal", text.slice(-300));
  };
  const all = () => Promise.all(Array.from({ length: sequences }, (_, client) => ask(client)));
  const startMs = performance.now();
  await all();
  const tookMs = performance.now() - startMs;
  const { plan }: FleetSnapshot = await (await fetch(`${url}/fleet`)).json();
  return {
    sequences,
    tokensPerSecond: sequences * tokens / tookMs * 1000,
    tokenMs: tookMs / tokens,
    wireMs: plan?.stages.map(({ latency }) => latency?.wire.p50 ?? 0) ?? [],
    gpuMs: plan?.stages.map(({ latency }) => latency?.gpu.p50 ?? 0) ?? [],
    busy: plan?.stages.map(({ busy }) => busy) ?? [],
  };
}

async function measureAll(model: string, stages: number, values: Values): Promise<Measurement[]> {
  return await withFleet(model, stages, values, async (url) => {
    // Not counted: whatever happens once.
    await measure(url, 1, 8);
    const measured: Measurement[] = [];
    for (const sequences of clients(values)) {
      measured.push(await measure(url, sequences, values.tokens));
    }
    return measured;
  });
}

/** A checkpoint directory with the demo model's tokenizer. */
async function checkpoint(values: Values, layers: number): Promise<string> {
  const directory = await Deno.makeTempDir({ prefix: "codegemm-fleet-bench-" });
  const format = parseFormatName(values.format);
  if (!format) throw new FleetError("bad-usage", `--format takes m1v4g128, not ${values.format}`);
  const bytes = await writeSyntheticCheckpoint(directory, {
    shape: values.shape as ShapeName,
    layers,
    format,
    contextTokens: values.context,
  });
  console.log(`${values.shape}, ${layers} layers: ${(bytes / 2 ** 30).toFixed(2)} GiB`);
  for await (const { name, isDirectory } of Deno.readDir(DEMO)) {
    if (!isDirectory) continue;
    for (const file of ["tokenizer.json", "tokenizer_config.json"]) {
      await Deno.copyFile(new URL(`${name}/${file}`, DEMO), `${directory}/${file}`);
    }
  }
  return directory;
}

function table(title: string, measured: readonly Measurement[], alone?: readonly Measurement[]) {
  console.log(`\n${title}`);
  console.log(
    "sequences   tokens/s   token ms   wire ms per hop     gpu ms per stage    efficiency",
  );
  const list = (numbers: number[]) => numbers.map((n) => n.toFixed(2)).join(" ").padEnd(18);
  for (const [index, m] of measured.entries()) {
    const stages = m.wireMs.length;
    const efficiency = alone ? m.tokensPerSecond / (stages * alone[index].tokensPerSecond) : null;
    console.log(
      [
        String(m.sequences).padStart(9),
        m.tokensPerSecond.toFixed(1).padStart(10),
        m.tokenMs.toFixed(2).padStart(10),
        ` ${list(m.wireMs)}`,
        ` ${list(m.gpuMs)}`,
        efficiency === null ? "" : `${(100 * efficiency).toFixed(0)} %`,
      ].join(" "),
    );
  }
}

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  if (!(values.shape in SHAPES)) {
    throw new FleetError("bad-usage", `--shape takes ${Object.keys(SHAPES).join(", ")}`);
  }
  const layers = values.layers ?? SHAPES[values.shape as ShapeName].layers;
  const model = await checkpoint(values, layers);
  try {
    const whole = await measureAll(model, values.workers, values);
    let alone: Measurement[] | undefined;
    if (values.workers > 1) {
      // One stage with all layers: a pipeline of S equal stages can be S times as fast, no more.
      alone = await measureAll(model, 1, values);
      table("one worker with all layers", alone);
    }
    table(`${values.workers} workers (efficiency: against that many times one)`, whole, alone);
    if (values.out) {
      await Deno.writeTextFile(
        values.out,
        JSON.stringify({ values, whole, alone }, null, 2) + "\n",
      );
    }
  } finally {
    await Deno.remove(model, { recursive: true });
  }
}

if (import.meta.main) await runCommand(main);
