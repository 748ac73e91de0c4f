/**
 * The nats-server configuration that a fleet needs: a websocket listener, JetStream, the payload bound,
 * and who may publish and subscribe to what. Pure: text out, passwords by reference.
 *
 * Two accounts: `FLEET` holds everything and sees, through an import, when one of its clients is
 * disconnected; `SYS` has no users. Without users the server is open to everybody who reaches it, which
 * is meant for loopback. With users there is one for the coordinator, who may do anything within
 * `FLEET`, and one per worker, named as the worker is, who may speak only in its own name and only
 * read the weights. Their permissions are static: they hold while stages move between workers.
 *
 * @module
 */
import { FleetError } from "./errors.ts";
import { LIMITS } from "./limits.ts";
import { COORDINATOR, Name, subjects } from "./protocol.ts";

/** What the server is to be. */
export interface NatsServerOptions {
  /** Prefix of the fleet's subjects. */
  prefix: string;
  /** Where the websocket listener listens: workers and the coordinator dial it. */
  websocket: { host: string; port: number };
  /** Port of the plain NATS listener, on loopback always: for NATS' own tools. */
  clientPort: number;
  /** Directory of JetStream's files. */
  storeDir: string;
  /** Bound of JetStream's files, bytes; absent: three quarters of the free disk. */
  maxStoreBytes?: number;
  /** Serves `wss://`; files in PEM. */
  tls?: { certFile: string; keyFile: string };
  /** Absent: open to everybody. `passwordFile` stands beside the configuration: a name, no path. */
  auth?: { workers: string[]; passwordFile: string };
}

/** The name of the account that the fleet lives in. */
const ACCOUNT = "FLEET";

/** Tells of every client that is gone, in JSON with the client's `name` and `user`. */
export const DISCONNECT_SUBJECT = `$SYS.ACCOUNT.${ACCOUNT}.DISCONNECT`;

/** Where answers to `name` go; a worker may subscribe to no other inbox. */
export function inboxPrefix(name: string): string {
  return `_INBOX.${name}`;
}

/** What a worker's user may publish and subscribe to. */
export function workerPermissions(
  prefix: string,
  worker: string,
): { publish: string[]; subscribe: string[] } {
  const fleet = subjects(prefix);
  return {
    publish: [
      fleet.hello(worker),
      fleet.beat(worker),
      fleet.report(worker),
      fleet.step("*", worker, "*"),
      "$JS.API.INFO",
      `$JS.API.DIRECT.GET.OBJ_${fleet.bucket}`,
    ],
    subscribe: [
      fleet.call,
      fleet.ctl(worker),
      `${prefix}.step.${worker}.>`,
      `${inboxPrefix(worker)}.>`,
    ],
  };
}

/**
 * The configuration, in nats-server's syntax. Passwords are not in it: it includes
 * `auth.passwordFile`, see {@linkcode passwordConfig}.
 *
 * @throws FleetError `bad-usage` when a worker's name is none, or taken
 */
export function natsServerConfig(options: NatsServerOptions): string {
  const { websocket, tls, auth } = options;
  const names = new Set([COORDINATOR]);
  for (const worker of auth?.workers ?? []) {
    if (!Name.safeParse(worker).success || names.has(worker)) {
      throw new FleetError(
        "bad-usage",
        `${
          JSON.stringify(worker)
        } cannot be a worker's name: it must be letters, digits, - and _, ` +
          `no other worker's, and not ${COORDINATOR}`,
      );
    }
    names.add(worker);
  }
  const store = options.maxStoreBytes === undefined
    ? ""
    : `\n  max_file_store: ${Math.floor(options.maxStoreBytes)}`;
  return `# What codegemm-fleet needs of nats-server (2.9 or newer).
host: "127.0.0.1"
port: ${options.clientPort}
max_payload: ${LIMITS.maxFrameBytes}

websocket {
  host: ${quote(websocket.host)}
  port: ${websocket.port}
  # Activations do not compress; trying costs more than it saves.
  compression: false
  ${
    tls
      ? `tls { cert_file: ${quote(tls.certFile)}, key_file: ${quote(tls.keyFile)} }`
      : "no_tls: true"
  }
}

jetstream {
  store_dir: ${quote(options.storeDir)}
  max_memory_store: 67108864${store}
}
${auth ? `\n# One password per user: not to be shown.\ninclude ${quote(auth.passwordFile)}\n` : ""}
system_account: SYS
accounts {
  SYS {
    exports: [{ stream: "$SYS.ACCOUNT.*.DISCONNECT" }]
  }
  ${ACCOUNT} {
    jetstream: enabled
    # The coordinator learns of a lost worker within milliseconds.
    imports: [{ stream: { account: SYS, subject: "${DISCONNECT_SUBJECT}" } }]
    users: [
${auth ? users(options.prefix, auth.workers) : `      { user: "everybody", password: "everybody" }`}
    ]
  }
}
${
    auth
      ? ""
      : `# No credentials are asked for: keep the listener on loopback.\nno_auth_user: "everybody"\n`
  }`;
}

/**
 * The file that {@linkcode natsServerConfig} includes: one variable per user.
 *
 * @param passwords by user; a user's own name is the coordinator's or a worker's
 */
export function passwordConfig(passwords: ReadonlyMap<string, string>): string {
  return [...passwords].map(([user, password]) => `${variable(user)}: ${quote(password)}\n`).join(
    "",
  );
}

function users(prefix: string, workers: string[]): string {
  const list = (subjects: string[]) => `[${subjects.map(quote).join(", ")}]`;
  return [
    `      { user: "${COORDINATOR}", password: $${variable(COORDINATOR)} }`,
    ...workers.map((worker) => {
      const { publish, subscribe } = workerPermissions(prefix, worker);
      return `      {
        user: "${worker}", password: $${variable(worker)}
        permissions {
          publish: ${list(publish)}
          subscribe: ${list(subscribe)}
          # Answers to control requests.
          allow_responses: { max: 1, expires: "30s" }
        }
      }`;
    }),
  ].join("\n");
}

function variable(user: string): string {
  return `PASSWORD_${user}`;
}

function quote(text: string): string {
  return JSON.stringify(text);
}
