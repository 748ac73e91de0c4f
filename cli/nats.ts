/**
 * `deno task nats`: runs a nats-server with what the fleet needs, or prints its configuration.
 *
 * Open on loopback; asking for credentials as soon as workers are named. Then a file per user is
 * written that only its owner may read: the coordinator takes its own with `--credentials`, and each
 * worker's is carried to its machine. Naming one worker more later keeps the others' passwords.
 *
 * @module
 */
import { resolve } from "node:path";
import { FleetError } from "../shared/errors.ts";
import { type ParsedFlags, parseFlags, runCommand } from "../shared/flags.ts";
import { natsServerConfig, passwordConfig } from "../shared/nats_config.ts";
import { COORDINATOR, DEFAULT_NATS_PORT, DEFAULT_PREFIX } from "../shared/protocol.ts";

const PASSWORD_FILE = "passwords.conf";
const PASSWORD_BYTES = 24;
const OWNER_ONLY = { mode: 0o600 };

/** The command line of `deno task nats`. */
export const COMMAND = {
  command: "nats",
  summary: "Runs a nats-server (2.9 or newer) with what the fleet needs.",
  flags: {
    listen: {
      type: "string",
      default: `127.0.0.1:${DEFAULT_NATS_PORT}`,
      env: "CODEGEMM_NATS_LISTEN",
      help: "HOST:PORT of the websocket listener that all dial",
    },
    workers: {
      type: "string",
      env: "CODEGEMM_NATS_WORKERS",
      help: "names of workers (a,b,c): each gets credentials, nobody else is let in",
    },
    dir: {
      type: "path",
      env: "CODEGEMM_NATS_DIR",
      help: "where configuration, credentials and weights are kept",
    },
    "tls-cert": { type: "path", env: "CODEGEMM_NATS_TLS_CERT", help: "certificate, PEM" },
    "tls-key": { type: "path", env: "CODEGEMM_NATS_TLS_KEY", help: "its key, PEM" },
    "max-store": {
      type: "bytes",
      min: 2 ** 20,
      env: "CODEGEMM_NATS_MAX_STORE",
      help: "disk that weights may take; three quarters of what is free by default",
    },
    "client-port": {
      type: "integer",
      default: 4222,
      min: 1,
      max: 65535,
      env: "CODEGEMM_NATS_CLIENT_PORT",
      help: "port on loopback for NATS' own tools",
    },
    prefix: {
      type: "string",
      default: DEFAULT_PREFIX,
      env: "CODEGEMM_PREFIX",
      help: "prefix of the fleet's subjects",
    },
    print: {
      type: "boolean",
      help: "print the configuration, which includes passwords.conf where workers are named",
    },
  },
} as const;

type Flags = ParsedFlags<typeof COMMAND.flags>["values"];

/** What is to be run. */
export interface Prepared {
  config: string;
  configFile: string;
  /** Of each user, when there are any. */
  credentialsFiles: string[];
  /** Of all users together, when there are any. */
  passwordFile: string | null;
  /** What its operator should know. */
  warnings: string[];
}

/**
 * Writes the configuration and, for every user that has none yet, credentials.
 *
 * @throws FleetError `bad-usage` or `disk`
 */
export async function prepare(flags: Flags): Promise<Prepared> {
  const websocket = parseListen(flags.listen);
  const workers = flags.workers?.split(",").map((name) => name.trim()).filter(Boolean) ?? [];
  const loopback = /^(127\.\d+\.\d+\.\d+|localhost|::1)$/.test(websocket.host);
  const { "tls-cert": certFile, "tls-key": keyFile } = flags;
  if ((certFile === undefined) !== (keyFile === undefined)) {
    throw new FleetError("bad-usage", "--tls-cert and --tls-key go together");
  }
  if (!loopback && workers.length === 0) {
    throw new FleetError(
      "bad-usage",
      `${websocket.host} can be reached from other machines: name the workers that may join with ` +
        "--workers, so that credentials are asked for",
    );
  }
  const dir = resolve(flags.dir ?? defaultDirectory());
  const config = natsServerConfig({
    prefix: flags.prefix,
    websocket,
    clientPort: flags["client-port"],
    storeDir: `${dir}/jetstream`,
    maxStoreBytes: flags["max-store"],
    tls: certFile !== undefined && keyFile !== undefined
      ? { certFile: await absolute(certFile), keyFile: await absolute(keyFile) }
      : undefined,
    auth: workers.length > 0 ? { workers, passwordFile: PASSWORD_FILE } : undefined,
  });
  const configFile = `${dir}/nats.conf`;
  const credentialsFiles: string[] = [];
  let passwordFile: string | null = null;
  try {
    if (!flags.print || workers.length > 0) await Deno.mkdir(dir, { recursive: true });
    if (workers.length > 0) {
      const passwords = new Map<string, string>();
      for (const user of [COORDINATOR, ...workers]) {
        const file = `${dir}/${user}.auth`;
        passwords.set(user, await passwordOf(user, file));
        credentialsFiles.push(file);
      }
      passwordFile = `${dir}/${PASSWORD_FILE}`;
      await writePrivate(passwordFile, passwordConfig(passwords));
    }
    // One that is only shown must not take the place of the one that a server runs with.
    if (!flags.print) await Deno.writeTextFile(configFile, config);
  } catch (cause) {
    if (cause instanceof FleetError) throw cause;
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new FleetError("disk", `Cannot write the configuration into ${dir}: ${reason}`, {
      cause,
    });
  }
  const warnings = !loopback && certFile === undefined
    ? ["without --tls-cert, passwords and activations cross the network in clear"]
    : [];
  return { config, configFile, credentialsFiles, passwordFile, warnings };
}

/** The password in a user's file, made where there is none. */
async function passwordOf(user: string, file: string): Promise<string> {
  const known = await Deno.readTextFile(file).catch((error) => {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  });
  if (known !== undefined) {
    const [name, password] = known.trim().split(":");
    if (name === user && password) return password;
    throw new FleetError("bad-usage", `${file} is not the credentials of ${user}; remove it`);
  }
  const password = crypto.getRandomValues(new Uint8Array(PASSWORD_BYTES)).toHex();
  await writePrivate(file, `${user}:${password}\n`);
  return password;
}

/** The mode counts at creation only, so it is set for a file that was there, too. */
async function writePrivate(file: string, text: string): Promise<void> {
  await Deno.writeTextFile(file, text, OWNER_ONLY);
  await Deno.chmod(file, OWNER_ONLY.mode);
}

function parseListen(text: string): { host: string; port: number } {
  const [, host, port] = /^(.+):(\d{1,5})$/.exec(text) ?? [];
  if (!host || Number(port) < 1 || Number(port) > 65535) {
    throw new FleetError("bad-usage", `--listen takes HOST:PORT, not ${JSON.stringify(text)}`);
  }
  return { host: host.replace(/^\[(.*)\]$/, "$1"), port: Number(port) };
}

function defaultDirectory(): string {
  const data = Deno.env.get("XDG_DATA_HOME") || `${Deno.env.get("HOME") ?? "."}/.local/share`;
  return `${data}/codegemm-fleet/nats`;
}

async function absolute(file: string): Promise<string> {
  try {
    return await Deno.realPath(file);
  } catch (cause) {
    throw new FleetError("bad-usage", `There is no file ${file}`, { cause });
  }
}

async function main(): Promise<void> {
  const { values } = parseFlags(COMMAND);
  const { config, configFile, credentialsFiles, passwordFile, warnings } = await prepare(values);
  for (const warning of warnings) console.error(`warning: ${warning}`);
  for (const file of credentialsFiles) console.error(`credentials: ${file}`);
  if (values.print) {
    if (passwordFile !== null) console.error(`to lie beside the configuration: ${passwordFile}`);
    console.log(config);
    return;
  }
  let server: Deno.ChildProcess;
  try {
    server = new Deno.Command("nats-server", { args: ["--config", configFile] }).spawn();
  } catch (cause) {
    throw new FleetError(
      "bad-usage",
      "nats-server is not installed (Debian: apt install nats-server); --print shows the " +
        "configuration for one elsewhere",
      { cause },
    );
  }
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    Deno.addSignalListener(signal, () => {
      try {
        server.kill("SIGTERM");
      } catch {
        // Ctrl-C reached it first.
      }
    });
  }
  const { code } = await server.status;
  Deno.exit(code);
}

if (import.meta.main) await runCommand(main);
