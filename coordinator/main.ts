/**
 * `deno task coordinator`: the process. Opens the checkpoint, puts its parts into the object store,
 * takes the fleet's lease, and serves the API.
 *
 * @module
 */
import { randomBytes } from "node:crypto";
import { createChatTemplate } from "../shared/chat_template.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { type Checkpoint, openCheckpoint, parseTokenizerConfig } from "../shared/checkpoint/mod.ts";
import { systemClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { parseFlags, runCommand } from "../shared/flags.ts";
import { connectNats, requireJetStream } from "../shared/nats_bus.ts";
import { NATS_FLAGS } from "../shared/nats_flags.ts";
import { COORDINATOR, fastestDecode, PROFILE_VERSION, subjects } from "../shared/protocol.ts";
import { createTokenizer } from "../shared/tokenizer.ts";
import { createApi } from "./api/mod.ts";
import { watchDisconnects } from "./disconnects.ts";
import { Fleet } from "./fleet.ts";
import { Lease } from "./lease.ts";
import { Metrics } from "./metrics.ts";
import { publishModel } from "./model_source.ts";
import { natsLeaseStore } from "./nats_lease.ts";
import type { FleetEvent } from "./snapshot.ts";

/** How long running answers, and the next coordinator, may take to hear that this one goes. */
const GOODBYE_MS = 1_000;

const COMMAND = {
  command: "coordinator",
  summary: "Splits a model over the workers that join, and serves it as an OpenAI-compatible API.",
  flags: {
    ...NATS_FLAGS,
    model: {
      type: "path",
      env: "CODEGEMM_MODEL",
      default: "models/story-16m-m1v4g128",
      help: "checkpoint directory in Hugging Face's layout",
    },
    name: { type: "string", env: "CODEGEMM_MODEL_NAME", help: "the model's id in the API" },
    host: {
      type: "string",
      env: "CODEGEMM_HOST",
      default: "127.0.0.1",
      help: "address the API listens on",
    },
    port: {
      type: "integer",
      env: "CODEGEMM_PORT",
      default: 8000,
      min: 0,
      max: 65535,
      help: "port of the API",
    },
    "api-key-file": {
      type: "path",
      env: "CODEGEMM_API_KEY_FILE",
      help: "file with one API key per line; required beyond loopback",
    },
    context: {
      type: "integer",
      env: "CODEGEMM_CONTEXT",
      min: 1,
      help: "longest sequence, tokens; the model's own, up to 8192, when absent",
    },
    sequences: {
      type: "integer",
      env: "CODEGEMM_SEQUENCES",
      default: 32,
      min: 1,
      max: 1024,
      help: "whole contexts to hold KV pages for; fewer where memory is short",
    },
    objective: {
      type: "string",
      env: "CODEGEMM_OBJECTIVE",
      default: "throughput",
      help: "what a plan aims for: throughput or latency",
    },
    stages: {
      type: "integer",
      env: "CODEGEMM_STAGES",
      min: 1,
      help: "wait for this many workers, and use all of them",
    },
    "no-upload": {
      type: "boolean",
      env: "CODEGEMM_NO_UPLOAD",
      help: "keep the weights out of the object store: every worker has --model",
    },
    decode: {
      type: "string",
      env: "CODEGEMM_DECODE",
      default: "auto",
      help:
        "kernel family: codegemm, dequantize, or auto: the faster of them for the format; or int8, which rounds activations and centroids to eight bits: faster, a little less exact",
    },
  },
} as const;

/** Longest sequence where nothing is said: what a 70B fleet can hold many of. */
const DEFAULT_CONTEXT = 8192;

function oneOf<const T extends string>(flag: string, given: string, choices: readonly T[]): T {
  const choice = choices.find((choice) => choice === given);
  if (choice) return choice;
  throw new FleetError("bad-usage", `--${flag} takes ${choices.join(" or ")}, not ${given}`);
}

async function readKeys(file: string | undefined, host: string): Promise<string[]> {
  if (file === undefined) {
    if (/^(127\.\d+\.\d+\.\d+|::1|localhost)$/.test(host)) return [];
    throw new FleetError(
      "bad-usage",
      `The API would listen on ${host}, beyond this machine: give --api-key-file, or --host 127.0.0.1`,
    );
  }
  let text: string;
  try {
    text = await Deno.readTextFile(file);
  } catch (cause) {
    throw new FleetError("disk", `Cannot read the API keys in ${file}`, { cause });
  }
  const keys = text.split("\n").map((line) => line.trim()).filter(Boolean);
  if (keys.length === 0) throw new FleetError("bad-usage", `${file} holds no API key`);
  return keys;
}

function printEvent({ level, text }: FleetEvent): void {
  const line = level === "info" ? text : `${level}: ${text}`;
  if (level === "error") console.error(line);
  else console.log(line);
}

/** What the API needs of the checkpoint beside its weights. */
function textSide(checkpoint: Checkpoint) {
  if (checkpoint.tokenizerJson === undefined) {
    throw new FleetError("bad-checkpoint", "The checkpoint has no tokenizer.json");
  }
  const tokenizer = createTokenizer(checkpoint.tokenizerJson, checkpoint.tokenizerConfigJson);
  const { bosToken, eosToken } = parseTokenizerConfig(checkpoint.tokenizerConfigJson);
  const chatTemplate = checkpoint.chatTemplate === undefined ? null : createChatTemplate(
    checkpoint.chatTemplate,
    { bosToken: bosToken ?? "", eosToken: eosToken ?? "", clock: systemClock },
  );
  return { tokenizer, chatTemplate };
}

/** Waits for what may hang: words through a NATS that is gone, an answer that nobody reads. */
async function atMost(ms: number, work: Promise<unknown>): Promise<void> {
  await Promise.race([work, new Promise((resolve) => setTimeout(resolve, ms))]);
}

/** @throws FleetError `bad-usage` for an address that is taken or is not this machine's */
function listen(
  hostname: string,
  port: number,
  modelId: string,
  handler: (request: Request) => Response | Promise<Response>,
): Deno.HttpServer {
  const onListen = (at: Deno.NetAddr) =>
    console.log(`${modelId} will be served at http://${at.hostname}:${at.port}/v1`);
  try {
    return Deno.serve({ hostname, port, onListen }, handler);
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    const message =
      `Cannot listen on ${hostname}:${port} (${why}); choose another --port or --host`;
    throw new FleetError("bad-usage", message, { cause });
  }
}

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  const objective = oneOf("objective", values.objective, ["throughput", "latency"]);
  const family = oneOf("decode", values.decode, ["auto", "codegemm", "dequantize", "int8"]);
  const apiKeys = await readKeys(values["api-key-file"], values.host);
  const checkpoint = await openCheckpoint(directorySource(values.model));
  const decode = family === "auto" ? fastestDecode(checkpoint.config.codegemm) : family;
  const { tokenizer, chatTemplate } = textSide(checkpoint);
  const contextTokens = Math.min(
    values.context ?? DEFAULT_CONTEXT,
    checkpoint.config.contextTokens,
  );

  const { bus, connection } = await connectNats({
    url: values.nats,
    name: COORDINATOR,
    credentialsFile: values.credentials,
    caFile: values.ca,
  });
  await requireJetStream(connection);
  let stop!: (error?: FleetError) => void;
  const stopped = new Promise<FleetError | undefined>((resolve) => stop = resolve);
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    Deno.addSignalListener(signal, () => stop());
  }
  const names = subjects(values.prefix);
  const lease = await Lease.acquire(
    await natsLeaseStore(connection, names.state),
    systemClock,
    `${Deno.hostname()}-${Deno.pid}-${randomBytes(4).toString("hex")}`,
    stop,
  );
  try {
    const publishing = publishModel(checkpoint, {
      directory: values.model,
      name: values.name,
      connection,
      bucket: names.bucket,
      upload: !values["no-upload"],
      log: (line) => console.log(line),
    });
    // Weights may take many minutes to upload; who stops us then need not wait.
    const model = await Promise.race([publishing, stopped.then(() => null)]);
    if (model) {
      const fleet = new Fleet({
        bus,
        clock: systemClock,
        prefix: values.prefix,
        model,
        nextEpoch: () => lease.nextEpoch(),
        contextTokens,
        sequences: values.sequences,
        objective,
        stages: values.stages ?? null,
        profile: { version: PROFILE_VERSION, decode },
        log: printEvent,
      });
      watchDisconnects(bus, (name) => fleet.disconnected(name));
      const api = createApi({
        engine: fleet,
        tokenizer,
        chatTemplate,
        clock: systemClock,
        randomSeed: () => randomBytes(8).readBigUInt64LE(),
        apiKeys,
        metrics: new Metrics(),
        log: (level, text) => printEvent({ atUnixMs: systemClock.unixMs(), level, text }),
      });
      const server = listen(values.host, values.port, model.id, api.fetch);
      fleet.start();
      await stopped;
      await fleet.stop();
      await atMost(GOODBYE_MS, server.shutdown());
    }
    const error = await stopped;
    if (error) throw error;
  } finally {
    await atMost(GOODBYE_MS, lease.release());
    await bus.close();
  }
  Deno.exit(0);
}

if (import.meta.main) await runCommand(main);
