/**
 * `deno task up`: a whole fleet on this machine: nats-server, a coordinator and workers, as the
 * separate processes that they are everywhere else. Ctrl-C stops all of them.
 *
 * @module
 */
import denoJson from "../deno.json" with { type: "json" };
import { gpuInfo } from "../kernels/gpu.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { DEFAULT_PREFIX } from "../shared/protocol.ts";
import { natsServerConfig } from "../shared/nats_config.ts";
import { freePort, listens } from "./ports.ts";
import { type Child, startChild, taskArgs } from "./processes.ts";

const ROOT = new URL("../", import.meta.url);
/** From start to the first token: the demo model loads in seconds, a 70B one takes minutes. */
const READY_WITHIN_MS = 30 * 60_000;
/** nats-server listens within a moment; a disk that is slow to sync its stores takes longer. */
const NATS_WITHIN_MS = 30_000;
const RESTART_AFTER_MS = 1_000;
/** Of the lines that are not shown, the last ones are told when their process ends unasked. */
const HIDDEN_LINES = 10;
const NATS = "nats";
const COLORS = [36, 33, 35, 32, 34, 31];

const COMMAND = {
  command: "up",
  summary: "Starts a whole fleet on this machine: nats-server, a coordinator and workers.",
  flags: {
    workers: { type: "integer", default: 2, min: 1, max: 32, help: "worker processes" },
    port: {
      type: "integer",
      default: 8000,
      min: 0,
      max: 65535,
      env: "CODEGEMM_PORT",
      help: "port of the API on 127.0.0.1; 0 takes a free one",
    },
    model: {
      type: "path",
      env: "CODEGEMM_MODEL",
      help: "checkpoint directory; the embedded demo model by default",
    },
    memory: {
      type: "string",
      env: "CODEGEMM_MEMORY",
      help: "GPU memory of each worker, e.g. 10GiB; by default they share what there is",
    },
    verbose: { type: "boolean", help: "show what nats-server prints, too" },
  },
} as const;

/** What runs on this machine, in the order it was started. */
class LocalFleet {
  readonly directory = Deno.makeTempDirSync({ prefix: "codegemm-fleet-up-" });
  /** Resolves when something that the fleet cannot do without has ended, or on request. */
  readonly over: Promise<FleetError | null>;
  #children = new Set<Child>();
  #hidden: string[] = [];
  #stopping = false;
  #end!: (error: FleetError | null) => void;
  readonly #width: number;
  readonly #verbose: boolean;

  constructor(names: string[], verbose: boolean) {
    this.over = new Promise((resolve) => this.#end = resolve);
    this.#width = Math.max(...names.map((name) => name.length));
    this.#verbose = verbose;
  }

  /** Starts a child whose end is the end of all. */
  start(name: string, command: string, args: string[]): void {
    this.#spawn(name, command, args).ended.then(({ code, signal }) => {
      if (this.#stopping) return;
      if (name === NATS) this.#hidden.forEach((line) => this.#print(name, line));
      this.#end(new FleetError("unavailable", `${name} ended (${signal ?? code})`));
    });
  }

  /** Starts a child that is started again when it ends: a worker, as its supervisor would. */
  keep(name: string, command: string, args: string[]): void {
    const child = this.#spawn(name, command, args);
    child.ended.then(({ code, signal }) => {
      if (this.#stopping) return;
      this.#print(name, `ended (${signal ?? code}); starting it again`);
      setTimeout(() => this.#stopping || this.keep(name, command, args), RESTART_AFTER_MS);
    });
  }

  /** Asks for the end. */
  end(error: FleetError | null = null): void {
    this.#end(error);
  }

  /** Stops every child, the last started first, and removes the directory. */
  async stop(): Promise<void> {
    this.#stopping = true;
    const children = [...this.#children];
    // nats-server goes last: the others say goodbye through it.
    await Promise.all(children.slice(1).map((child) => child.stop()));
    await children[0]?.stop();
    await Deno.remove(this.directory, { recursive: true });
  }

  #spawn(name: string, command: string, args: string[]): Child {
    const child = startChild({
      name,
      command,
      args,
      cwd: ROOT.pathname,
      ownGroup: true,
      // Without it, Mesa complains at every start.
      env: { XDG_RUNTIME_DIR: Deno.env.get("XDG_RUNTIME_DIR") ?? this.directory },
      onLine: (_, line) => {
        // That each is lost to the others now need not be read.
        if (this.#stopping) return;
        if (name !== NATS || this.#verbose) return this.#print(name, line);
        this.#hidden = [...this.#hidden, line].slice(-HIDDEN_LINES);
      },
    });
    this.#children.add(child);
    child.ended.then(() => this.#children.delete(child));
    return child;
  }

  #print(name: string, line: string): void {
    const label = name.padEnd(this.#width);
    const index = [...name].reduce((sum, char) => sum + char.charCodeAt(0), 0);
    const colored = Deno.stdout.isTerminal() && !Deno.noColor
      ? `\x1b[${COLORS[index % COLORS.length]}m${label}\x1b[0m`
      : label;
    printLine(`${colored} | ${line}`);
  }
}

/** Prints even where nobody reads any more: a closed terminal must not keep us from cleaning up. */
function printLine(line: string): void {
  try {
    Deno.stdout.writeSync(new TextEncoder().encode(`${line}\n`));
  } catch { /* the reader is gone */ }
}

/** Whether WebGPU finds nothing but a software adapter here. */
async function onlySoftware(): Promise<boolean> {
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) {
    throw new FleetError(
      "gpu",
      "WebGPU finds no adapter; install the GPU's Vulkan driver, or mesa-vulkan-drivers to run on " +
        "the CPU (./run up does it on Debian)",
    );
  }
  return gpuInfo(adapter).software;
}

/** Asks again and again until `holds`; false when the time or the fleet was over before. */
async function until(
  holds: () => Promise<boolean>,
  fleet: LocalFleet,
  { everyMs, withinMs }: { everyMs: number; withinMs: number },
): Promise<boolean> {
  let over = false;
  fleet.over.then(() => over = true);
  const deadline = performance.now() + withinMs;
  while (!over && performance.now() < deadline) {
    if (await holds()) return true;
    await new Promise((resolve) => setTimeout(resolve, everyMs));
  }
  return false;
}

/** Whether the API says that tokens come out. */
async function isReady(url: string): Promise<boolean> {
  try {
    const response = await fetch(`${url}/readyz`);
    await response.body?.cancel();
    return response.ok;
  } catch {
    return false;
  }
}

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  const software = await onlySoftware();
  const names = Array.from({ length: values.workers }, (_, i) => `worker-${i + 1}`);
  const fleet = new LocalFleet(["coordinator", ...names], values.verbose);
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    Deno.addSignalListener(signal, () => fleet.end());
  }
  let failure: FleetError | null = null;
  try {
    await startAll(fleet, values, names, software);
    failure = await fleet.over;
  } finally {
    await fleet.stop();
  }
  if (failure) throw failure;
}

async function startAll(
  fleet: LocalFleet,
  values: ReturnType<typeof parseFlags<typeof COMMAND.flags>>["values"],
  names: string[],
  software: boolean,
): Promise<void> {
  const websocketPort = freePort(), apiPort = freePort(values.port);
  const nats = `ws://127.0.0.1:${websocketPort}`;
  const configFile = `${fleet.directory}/nats.conf`;
  await Deno.writeTextFile(
    configFile,
    natsServerConfig({
      prefix: DEFAULT_PREFIX,
      websocket: { host: "127.0.0.1", port: websocketPort },
      clientPort: freePort(),
      storeDir: `${fleet.directory}/jetstream`,
    }),
  );
  fleet.start(NATS, "nats-server", ["-c", configFile]);
  const listening = () => listens(websocketPort);
  if (!await until(listening, fleet, { everyMs: 20, withinMs: NATS_WITHIN_MS })) {
    return fleet.end(new FleetError("nats", "nats-server runs, but does not listen"));
  }
  const deno = Deno.execPath(), { tasks } = denoJson;
  const checkpoint = values.model ? ["--model", values.model] : [];
  fleet.start("coordinator", deno, [
    ...taskArgs(tasks, "coordinator"),
    ...["--nats", nats, "--port", String(apiPort), "--stages", String(names.length)],
    ...checkpoint,
    // The workers read it where it is: copies of a large one would fill the disk.
    ...(values.model ? ["--no-upload"] : []),
  ]);
  for (const name of names) {
    fleet.keep(name, deno, [
      ...taskArgs(tasks, "worker"),
      ...["--nats", nats, "--name", name],
      ...(software ? ["--software"] : []),
      ...checkpoint,
      // They all get the same GPU: WebGPU lets nobody choose another.
      ...(values.memory
        ? ["--memory", values.memory]
        : ["--memory-share", String(1 / names.length)]),
    ]);
  }
  const url = `http://127.0.0.1:${apiPort}`;
  const ready = () => isReady(url);
  if (!await until(ready, fleet, { everyMs: 200, withinMs: READY_WITHIN_MS })) return;
  const { data: [model] } = await (await fetch(`${url}/v1/models`)).json();
  printLine(
    `ready: ${url}/ shows the fleet; try: curl -N ${url}/v1/chat/completions ` +
      `-H 'content-type: application/json' -d '${
        JSON.stringify({
          model: model.id,
          messages: [{ role: "user", content: "Tell me a story about a fox." }],
          stream: true,
        })
      }'`,
  );
}

if (import.meta.main) await runCommand(main);
