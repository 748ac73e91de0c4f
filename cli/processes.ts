/**
 * Child processes that are started together and stopped together.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";

/** How long a child may take to stop before it is killed. */
const STOP_MS = 5_000;

/** A child to start. */
export interface ChildOptions {
  name: string;
  command: string;
  args: string[];
  env?: Record<string, string>;
  cwd?: string;
  /**
   * Ctrl-C in a terminal reaches a whole group of processes at once. A child in a group of its own
   * does not hear it: its parent does, and stops its children in an order in which each can still say
   * goodbye.
   */
  ownGroup?: boolean;
  /** Called with each line that it prints. */
  onLine: (name: string, line: string) => void;
}

/** A running child. */
export interface Child {
  readonly name: string;
  readonly pid: number;
  /** Resolves when it has ended. */
  readonly ended: Promise<{ code: number; signal: Deno.Signal | null }>;
  /** SIGTERM, then SIGKILL; resolves when it is gone. */
  stop(): Promise<void>;
}

/**
 * Starts a child; its output is handed on line by line.
 *
 * @throws FleetError `bad-usage` when there is no such program
 */
export function startChild(options: ChildOptions): Child {
  let process: Deno.ChildProcess;
  try {
    process = new Deno.Command(options.command, {
      args: options.args,
      env: options.env,
      cwd: options.cwd,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
      detached: options.ownGroup,
    }).spawn();
  } catch (cause) {
    throw new FleetError("bad-usage", `Cannot start ${options.command}; is it installed?`, {
      cause,
    });
  }
  const drained = Promise.all(
    [process.stdout, process.stderr].map((stream) =>
      eachLine(stream, (line) => options.onLine(options.name, line))
    ),
  );
  const ended = process.status.then(async (status) => {
    await drained;
    return { code: status.code, signal: status.signal };
  });
  let stopping: Promise<void> | null = null;
  const stop = async () => {
    const kill = (signal: Deno.Signal) => {
      try {
        process.kill(signal);
      } catch { /* it has ended already */ }
    };
    kill("SIGTERM");
    const timer = setTimeout(() => kill("SIGKILL"), STOP_MS);
    await ended;
    clearTimeout(timer);
  };
  return { name: options.name, pid: process.pid, ended, stop: () => stopping ??= stop() };
}

async function eachLine(
  stream: ReadableStream<Uint8Array<ArrayBuffer>>,
  onLine: (line: string) => void,
): Promise<void> {
  let rest = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop() ?? "";
    lines.forEach(onLine);
  }
  if (rest !== "") onLine(rest);
}

/**
 * The arguments that `deno task NAME` passes to deno, so that a child runs with the very permissions
 * of the task.
 *
 * @param tasks the `tasks` of deno.json
 */
export function taskArgs(tasks: Record<string, string>, name: string): string[] {
  const words = tasks[name]?.split(/\s+/) ?? [];
  if (words[0] !== "deno" || words[1] !== "run") {
    throw new Error(`deno.json has no task ${name} that is a plain deno run`);
  }
  return words.slice(1);
}
