/**
 * A real nats-server for tests: the fleet's own configuration on free ports of loopback, its files in
 * a temporary directory. Nothing is left behind after `stop()`.
 *
 * @module
 */
import { freePort, listens } from "../cli/ports.ts";
import { natsServerConfig, type NatsServerOptions, passwordConfig } from "../shared/nats_config.ts";
import { COORDINATOR } from "../shared/protocol.ts";

export { freePort } from "../cli/ports.ts";

/** What to change about the server. */
export interface TestServerOptions {
  /** Prefix of the fleet's subjects; "test" when absent. */
  prefix?: string;
  maxStoreBytes?: number;
  tls?: NatsServerOptions["tls"];
  /** Asks for credentials, of the coordinator and these workers. */
  workers?: string[];
  /** The last word on the configuration's text. */
  configure?: (config: string) => string;
}

/** A running server. */
export interface TestServer extends AsyncDisposable {
  /** Of the websocket listener. */
  url: string;
  /** Of the plain NATS listener. */
  clientPort: number;
  /** The credentials file of a user. */
  credentialsFile(user: string): string;
  /** Ends the process at once, as a crash does; JetStream's files stay. */
  kill(): Promise<void>;
  /** Starts it again on the same ports and files. */
  restart(): Promise<void>;
  /** Freezes the process (SIGSTOP) or lets it go on (SIGCONT). */
  signal(signal: Deno.Signal): void;
  /** Ends it and removes its files. */
  stop(): Promise<void>;
}

/** Starts a server and waits until it answers. */
export async function startNatsServer(options: TestServerOptions = {}): Promise<TestServer> {
  const dir = await Deno.makeTempDir({ prefix: "codegemm-fleet-nats-" });
  const [port, clientPort] = [freePort(), freePort()];
  const credentialsFile = (user: string) => `${dir}/${user}.auth`;
  const passwordFile = "passwords.conf";
  const config = natsServerConfig({
    prefix: options.prefix ?? "test",
    websocket: { host: "127.0.0.1", port },
    clientPort,
    storeDir: `${dir}/jetstream`,
    maxStoreBytes: options.maxStoreBytes ?? 2 ** 30,
    tls: options.tls,
    auth: options.workers && { workers: options.workers, passwordFile },
  });
  await Deno.writeTextFile(`${dir}/nats.conf`, options.configure?.(config) ?? config);
  if (options.workers) {
    const users = [COORDINATOR, ...options.workers];
    const passwords = new Map(users.map((user) => [user, crypto.randomUUID()]));
    await Deno.writeTextFile(`${dir}/${passwordFile}`, passwordConfig(passwords));
    for (const [user, password] of passwords) {
      await Deno.writeTextFile(credentialsFile(user), `${user}:${password}\n`);
    }
  }
  const url = `${options.tls ? "wss" : "ws"}://127.0.0.1:${port}`;
  let child: Deno.ChildProcess;
  let complaints: Promise<string>;

  const start = async () => {
    child = new Deno.Command("nats-server", {
      args: ["--config", `${dir}/nats.conf`, "--log", `${dir}/log`],
      stdin: "null",
      stdout: "null",
      stderr: "piped",
    }).spawn();
    complaints = new Response(child.stderr).text();
    let ended = false;
    child.status.then(() => ended = true);
    for (const deadline = performance.now() + 10_000;;) {
      if (await listens(port)) return;
      if (ended || performance.now() > deadline) {
        await kill();
        const log = await Deno.readTextFile(`${dir}/log`).catch(() => "no log");
        throw new Error(`nats-server did not start:\n${await complaints}${log}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  };
  const kill = async () => {
    try {
      child.kill("SIGKILL");
    } catch {
      // It has ended already.
    }
    await Promise.all([child.status, complaints]);
  };
  const stop = async () => {
    await kill();
    await Deno.remove(dir, { recursive: true });
  };
  try {
    await start();
  } catch (error) {
    await stop();
    throw error;
  }
  return {
    url,
    clientPort,
    credentialsFile,
    kill,
    restart: async () => {
      await kill();
      await start();
    },
    signal: (signal) => child.kill(signal),
    stop,
    [Symbol.asyncDispose]: stop,
  };
}
