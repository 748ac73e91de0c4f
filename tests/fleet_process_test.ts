/**
 * The fleet as people run it: `up` with real processes, a real nats-server, the real API.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import OpenAI from "openai";
import denoJson from "../deno.json" with { type: "json" };
import { startChild, taskArgs } from "../cli/processes.ts";
import { freePort } from "../cli/ports.ts";

const ROOT = new URL("../", import.meta.url).pathname;
const MODEL = "story-16m-m1v4g128";

const READY_WITHIN_MS = 180_000;

interface UpFleet extends AsyncDisposable {
  url: string;
  pid: number;
  lines: string[];
  /** Ends it as Ctrl-C in a terminal does; resolves with its exit code. */
  interrupt(): Promise<number>;
}

/** Starts `up` and waits for its ready line. */
async function startUp(...flags: string[]): Promise<UpFleet> {
  const port = freePort();
  const lines: string[] = [];
  const { promise: ready, resolve } = Promise.withResolvers<void>();
  const up = startChild({
    name: "up",
    command: Deno.execPath(),
    args: [...taskArgs(denoJson.tasks, "up"), "--port", String(port), ...flags],
    cwd: ROOT,
    ownGroup: true,
    onLine: (_, line) => {
      lines.push(line);
      if (line.startsWith("ready: ")) resolve();
    },
  });
  let over = false;
  up.ended.then(() => over = true);
  const interrupt = async () => {
    // As a terminal does: to all of the group.
    if (!over) Deno.kill(-up.pid, "SIGINT");
    return (await up.ended).code;
  };
  const { promise: late, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(
    () => reject(new Error(`up was not ready in ${READY_WITHIN_MS} ms:\n${lines.join("\n")}`)),
    READY_WITHIN_MS,
  );
  const ended = up.ended.then(({ code }) => {
    throw new Error(`up ended with ${code}:\n${lines.join("\n")}`);
  });
  try {
    await Promise.race([ready, late, ended]);
  } catch (error) {
    await interrupt();
    throw error;
  }
  ended.catch(() => {});
  clearTimeout(timer);
  return {
    url: `http://127.0.0.1:${port}`,
    pid: up.pid,
    lines,
    interrupt,
    [Symbol.asyncDispose]: async () => void await interrupt(),
  };
}

/** Streams one completion; its text and how it ended. */
async function stream(url: string, body: object): Promise<{ text: string; end: string }> {
  const response = await fetch(`${url}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: MODEL, stream: true, ...body }),
  });
  assertEquals(response.status, 200, response.ok ? "" : await response.text());
  let text = "", end = "";
  for (const line of (await response.text()).split("\n")) {
    if (!line.startsWith("data: {")) continue;
    const chunk = JSON.parse(line.slice("data: ".length));
    assert(!chunk.error, JSON.stringify(chunk.error));
    text += chunk.choices[0]?.text ?? "";
    end = chunk.choices[0]?.finish_reason ?? end;
  }
  return { text, end };
}

/** A process and all that it started, and they did. */
async function familyOf(pid: number): Promise<number[]> {
  const parents = new Map<number, number>();
  for await (const { name } of Deno.readDir("/proc")) {
    const stat = await Deno.readTextFile(`/proc/${name}/stat`).catch(() => null);
    // The name of the program, in parentheses, may hold spaces.
    if (stat) {
      parents.set(Number(name), Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[1]));
    }
  }
  const family = [pid];
  for (const parent of family) {
    for (const [child, of] of parents) if (of === parent) family.push(child);
  }
  return family;
}

/** Waits until none of these processes is there; the command lines of those that stay. */
async function remaining(pids: readonly number[]): Promise<string[]> {
  for (const deadline = performance.now() + 5_000;;) {
    const lines = await Promise.all(
      pids.map((pid) => Deno.readTextFile(`/proc/${pid}/cmdline`).catch(() => "")),
    );
    const alive = lines.filter((line) => line !== "");
    if (alive.length === 0 || performance.now() > deadline) return alive;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** The processes whose command line holds `word`. */
async function processesWith(word: string): Promise<string[]> {
  const found: string[] = [];
  for await (const { name } of Deno.readDir("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    const command = await Deno.readTextFile(`/proc/${name}/cmdline`).catch(() => "");
    if (command.includes(word)) found.push(name);
  }
  return found;
}

Deno.test({
  name:
    "64 streaming clients at once on a fleet of two workers, one of which is killed, get what each gets alone",
  ignore: Deno.build.os !== "linux",
  async fn(t) {
    await using fleet = await startUp("--workers", "2");
    const natsUrl = fleet.lines.join("\n").match(/ws:\/\/127\.0\.0\.1:\d+/)![0];
    const request = (client: number) => ({
      prompt: ["Once upon a time", "The fox", '"Where is', "A little girl"][client % 4],
      max_tokens: 6 + client % 3,
      temperature: client % 2,
      seed: client >> 2,
    });

    await t.step("all finish, and none is mixed up with another", async () => {
      const together = await Promise.all(
        Array.from({ length: 64 }, (_, client) => stream(fleet.url, request(client))),
      );
      assert(together.every(({ end }) => end === "length" || end === "stop"));
      for (const client of [0, 1, 22, 63]) {
        assertEquals(together[client], await stream(fleet.url, request(client)), `${client}`);
      }
    });

    await t.step("OpenAI's own client chats with it", async () => {
      const client = new OpenAI({ baseURL: `${fleet.url}/v1`, apiKey: "none" });
      const [model] = (await client.models.list()).data;
      assertEquals(model.id, MODEL);
      const request = {
        model: model.id,
        messages: [{ role: "user" as const, content: "Tell me about a fox." }],
        max_tokens: 8,
        seed: 5,
      };
      const two = await client.chat.completions.create({ ...request, n: 2, logprobs: true });
      const texts = two.choices.map(({ message }) => message.content);
      assert(texts[0] !== texts[1], "the choices of a request differ");
      assertEquals(two.choices[0].logprobs?.content?.length, 8);
      let text = "";
      let usage: number | undefined;
      const options = {
        ...request,
        stream: true as const,
        stream_options: { include_usage: true },
      };
      for await (const chunk of await client.chat.completions.create(options)) {
        text += chunk.choices[0]?.delta.content ?? "";
        usage = chunk.usage?.completion_tokens ?? usage;
      }
      assertEquals([text, usage], [texts[0], 8]);
    });

    await t.step("a killed worker costs no stream a token", async () => {
      const calm = await Promise.all([0, 1, 2, 3].map((c) => stream(fleet.url, longer(c))));
      const streams = [0, 1, 2, 3].map((client) => stream(fleet.url, longer(client)));
      const running = async () => (await (await fetch(`${fleet.url}/fleet`)).json()).load.running;
      while (await running() < 4) await new Promise((resolve) => setTimeout(resolve, 20));
      const [victim] = await processesWith(`${natsUrl}\0--name\0worker-2`);
      Deno.kill(Number(victim), "SIGKILL");
      assertEquals(await Promise.all(streams), calm);
      const { events } = await (await fetch(`${fleet.url}/fleet`)).json();
      assert(events.some(({ text }: { text: string }) => /worker-2 is lost/.test(text)));
    });

    await t.step("Ctrl-C ends it all, and leaves nothing behind", async () => {
      const family = await familyOf(fleet.pid);
      assert(family.length >= 5, "up, nats-server, a coordinator and two workers");
      const commands = await Promise.all(
        family.map((pid) => Deno.readTextFile(`/proc/${pid}/cmdline`)),
      );
      const directory = commands.join("\0").match(/[^\0]*codegemm-fleet-up-[^/\0]*/)![0];
      const startMs = performance.now();
      assertEquals(await fleet.interrupt(), 0);
      assert(performance.now() - startMs < 4_000, "all went by themselves, none had to be killed");
      assertEquals(await remaining(family), []);
      assertEquals(await Deno.stat(directory).then(() => true, () => false), false);
    });

    function longer(client: number) {
      return { ...request(client), max_tokens: 24 };
    }
  },
});

Deno.test("up says in one line what it cannot do", async () => {
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const refusals: [flags: string[], line: RegExp][] = [
    [["--workers", "0"], /^error: --workers takes 1 to 32, not 0;[^\n]*\n$/],
    [["--port", String(taken.addr.port)], /error: Port \d+ cannot be had \([^\n]*--port\n$/],
  ];
  for (const [flags, line] of refusals) {
    const { stderr, code } = await new Deno.Command(Deno.execPath(), {
      args: [...taskArgs(denoJson.tasks, "up"), ...flags],
      cwd: ROOT,
    }).output();
    assertEquals(code, 2);
    assertMatch(new TextDecoder().decode(stderr), line);
  }
});
