/**
 * `deno task worker`: a process with one GPU that joins a fleet. It only dials out. The main thread
 * has the bus and the beats; the GPU and the downloads have threads of their own.
 *
 * Whatever it cannot mend itself ends it with a reason and a status other than 0: it is meant to be
 * started again by whatever supervises it.
 *
 * @module
 */
import { systemClock } from "../shared/clock.ts";
import { FleetError, toFleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { connectNats, type NatsLink, parseCredentials } from "../shared/nats_bus.ts";
import { NATS_FLAGS } from "../shared/nats_flags.ts";
import { COORDINATOR, Name, PROTOCOL_VERSION, subjects } from "../shared/protocol.ts";
import { GpuClient } from "./gpu_client.ts";
import { gpuMemory, type Machine } from "./memory.ts";
import type { PartLocation } from "./part_location.ts";
import { TransferClient } from "./transfer_client.ts";
import { FleetWorker } from "./worker.ts";

const COMMAND = {
  command: "worker",
  summary: "Joins a fleet with this machine's GPU, and serves the layers that it is given.",
  flags: {
    ...NATS_FLAGS,
    name: {
      type: "string",
      env: "CODEGEMM_NAME",
      help: "this worker's name; by default the user of the credentials, or the host's name",
    },
    memory: {
      type: "bytes",
      env: "CODEGEMM_MEMORY",
      min: 1,
      help: "GPU memory to use, e.g. 22GiB; found out by default",
    },
    "memory-share": {
      type: "number",
      env: "CODEGEMM_MEMORY_SHARE",
      default: 1,
      min: 0.01,
      max: 1,
      help: "of the GPU's memory, without --memory: 0.5 where two workers have one GPU",
    },
    software: {
      type: "boolean",
      env: "CODEGEMM_SOFTWARE",
      help: "take a software adapter too (slow: for trying things)",
    },
    cache: {
      type: "path",
      env: "CODEGEMM_CACHE",
      help: "directory of downloaded parts; by default $XDG_CACHE_HOME/codegemm-fleet",
    },
    "cache-limit": {
      type: "bytes",
      env: "CODEGEMM_CACHE_LIMIT",
      default: 128 * 2 ** 30,
      min: 1,
      help: "bytes that the cache may hold",
    },
    model: {
      type: "path",
      env: "CODEGEMM_MODEL",
      help: "a checkpoint on this machine, read in place of downloads",
    },
  },
} as const;

type Values = ReturnType<typeof parseFlags<typeof COMMAND.flags>>["values"];

/** Saying goodbye takes at most this long. */
const GOODBYE_MS = 700;

const MACHINE: Machine = {
  os: Deno.build.os,
  memoryBytes: () => Deno.systemMemoryInfo().total,
  async run(program, args) {
    try {
      const command = new Deno.Command(program, { args, stdin: "null", stderr: "null" });
      return new TextDecoder().decode((await command.output()).stdout);
    } catch {
      return null;
    }
  },
};

/** Everything that the process holds. */
interface Holdings {
  link: NatsLink;
  gpu: GpuClient;
  transfer: TransferClient;
  /** Once it has joined. */
  worker: FleetWorker<PartLocation> | null;
}

/** Who this process is. */
interface Identity {
  name: string;
  instance: string;
  host: string;
}

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  /** Resolves with null when asked to go, with an error when the process cannot go on. */
  const over = Promise.withResolvers<FleetError | null>();
  onSignals(() => over.resolve(null));
  const self = await identify(values);
  const nats = natsOptions(values, self);
  // Before the GPU is opened, for it fails fastest.
  const { hello, ctl } = subjects(values.prefix), own = [hello(self.name), ctl(self.name)];
  const onRefused = (operation: string, subject: string) => {
    if (!own.includes(subject)) return;
    const message =
      `NATS keeps this user from the ${operation} to ${subject}: the credentials are ` +
      `not those of the worker ${self.name}; leave --name away, or pass its own`;
    over.resolve(new FleetError("unauthorized", message));
  };
  const connecting = connectNats({ ...nats, onRefused });
  const link = await Promise.race([connecting, over.promise.then(() => null)]);
  if (!link) Deno.exit(0);
  link.bus.onStatus((status) => {
    if (status !== "closed") return log(`NATS: ${status}`);
    over.resolve(new FleetError("nats", "The NATS connection is closed"));
  });
  const gpu = new GpuClient(), transfer = new TransferClient();
  const held: Holdings = { link, gpu, transfer, worker: null };
  gpu.failure.then(over.resolve);
  transfer.death.then(over.resolve);
  const onFailure = (error: FleetError) => {
    // What else may fail a stage leaves the GPU as it was, for the next plan.
    if (error.code === "gpu") over.resolve(error);
  };
  join(held, values, self, onFailure).catch(over.reject);
  try {
    const failure = await over.promise;
    if (failure) throw failure;
  } catch (error) {
    await leave(held, toFleetError(error));
    throw error;
  }
  await leave(held, null);
  Deno.exit(0);
}

/** Opens the GPU and the cache, and joins the fleet with what they are. */
async function join(
  held: Holdings,
  values: Values,
  self: Identity,
  onFailure: (error: FleetError) => void,
): Promise<void> {
  const { gpu, transfer, link } = held;
  const directory = values.cache ?? cacheDirectory();
  const [opened] = await Promise.all([
    gpu.open({ software: values.software, tuningFile: `${directory}/kernels.json` }, log),
    transfer.open({
      nats: natsOptions(values, self),
      prefix: values.prefix,
      cache: { directory, limitBytes: values["cache-limit"] },
      modelDirectory: values.model,
    }, log),
  ]);
  const wish = { bytes: values.memory, share: values["memory-share"] };
  const memory = await gpuMemory(opened.info, wish, MACHINE);
  const worker = new FleetWorker({
    bus: link.bus,
    clock: systemClock,
    subjects: subjects(values.prefix),
    card: {
      version: PROTOCOL_VERSION,
      worker: self.name,
      instance: self.instance,
      host: self.host,
      gpu: opened.info,
      memoryBytes: memory.bytes,
      maxBindingBytes: opened.maxBindingBytes,
      selfTestDigest: opened.selfTestDigest,
      calibration: opened.calibration,
    },
    parts: transfer,
    loader: gpu,
    onFailure,
    log,
  });
  held.worker = worker;
  worker.join();
  log(
    `${self.name} joined ${values.prefix} at ${values.nats} with ${opened.info.name}, ` +
      `${(memory.bytes / 2 ** 30).toFixed(1)} GiB (${memory.source})`,
  );
}

/**
 * Says goodbye and lets go of everything but the GPU thread, in bounded time. That one ends with the
 * process: ending it just before, while the driver takes its own leave, crashed one process in twelve.
 */
async function leave(held: Holdings, failure: FleetError | null): Promise<void> {
  const goodbye = async () => {
    if (failure) held.worker?.fail(failure);
    else await held.worker?.leave();
    held.worker?.close();
    await Promise.all([held.link.bus.close(), held.transfer.close()]);
  };
  const bound = new Promise((resolve) => setTimeout(resolve, GOODBYE_MS));
  await Promise.race([goodbye().catch(() => {}), bound]);
}

function onSignals(handler: () => void): void {
  Deno.addSignalListener("SIGINT", handler);
  if (Deno.build.os !== "windows") Deno.addSignalListener("SIGTERM", handler);
}

function natsOptions(values: Values, { name }: Identity) {
  const { nats: url, credentials: credentialsFile, ca: caFile } = values;
  return { url, name, credentialsFile, caFile };
}

/** @throws FleetError `bad-usage` for a name that cannot stand in a subject */
async function identify(values: Values): Promise<Identity> {
  const host = Deno.hostname();
  const instance = crypto.randomUUID().replaceAll("-", "").slice(0, 12);
  const name = values.name ?? await userOf(values.credentials) ??
    `${host.replaceAll(/[^A-Za-z0-9_-]/g, "-").slice(0, 48)}-${instance.slice(0, 4)}`;
  if (Name.safeParse(name).success && name !== COORDINATOR) return { name, instance, host };
  throw new FleetError(
    "bad-usage",
    `${JSON.stringify(name)} cannot be a worker's name: use letters, digits, - and _ (--name)`,
  );
}

/** The user that a credentials file names, whose permissions hold for a worker of the same name. */
async function userOf(credentialsFile: string | undefined): Promise<string | undefined> {
  if (credentialsFile === undefined) return undefined;
  const text = await Deno.readTextFile(credentialsFile).catch(() => null);
  return text === null ? undefined : parseCredentials(text).user;
}

function cacheDirectory(): string {
  const base = Deno.env.get("XDG_CACHE_HOME") ||
    (Deno.build.os === "windows"
      ? Deno.env.get("LOCALAPPDATA")
      : Deno.env.get("HOME") && `${Deno.env.get("HOME")}/.cache`);
  if (base) return `${base}/codegemm-fleet`;
  throw new FleetError("bad-usage", "There is no home directory for the cache; pass --cache DIR");
}

function log(line: string): void {
  console.log(line);
}

if (import.meta.main) await runCommand(main);
