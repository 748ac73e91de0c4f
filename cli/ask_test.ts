import { assertEquals, assertMatch, assertRejects, assertStringIncludes } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { scriptedApi, ScriptedEngine, serveOnLoopback } from "../tests/api_fixture.ts";
import { ask, type Question } from "./ask.ts";

const question: Question = { prompt: "Hi", raw: false };

async function withFleet(
  changes: Parameters<typeof scriptedApi>[0],
  use: (
    run: (asked: Question, key?: string) => Promise<{ text: string; notes: string[] }>,
    engine: ScriptedEngine,
  ) => Promise<void>,
) {
  const { app, engine } = scriptedApi(changes);
  const served = serveOnLoopback(app);
  const run = async (asked: Question, key: string | null = null) => {
    let text = "";
    const notes: string[] = [];
    await ask({ url: served.url, key }, asked, {
      write: (piece) => {
        text += piece;
      },
      note: (line) => notes.push(line),
    });
    return { text, notes };
  };
  try {
    await use(run, engine);
  } finally {
    await served.stop();
  }
}

const promptOf = (engine: ScriptedEngine) =>
  new TextDecoder().decode(Uint8Array.from(engine.requests.at(-1)!.promptTokens));

Deno.test("ask prints the answer, and its speed beside it", () =>
  withFleet({}, async (run, engine) => {
    const asked = { ...question, system: "be", maxTokens: 9, temperature: 0, seed: 5 };
    const { text, notes } = await run(asked);
    assertEquals(text, "Hello\n");
    assertMatch(notes[0], /^6 tokens, first token after \d+ ms, [\d.]+ tokens\/s$/);
    assertEquals(promptOf(engine), "<system>be<user>Hi<assistant>");
    const { maxTokens, temperature, seed } = engine.requests[0];
    assertEquals([maxTokens, temperature, seed], [9, 0, 5n]);
  }));

Deno.test("ask --raw and a model without a template continue the prompt", async () => {
  await withFleet({}, async (run, engine) => {
    assertEquals((await run({ ...question, raw: true })).text, "Hello\n");
    assertEquals(engine.requests[0].promptTokens.length, 3);
  });
  await withFleet({ chatTemplate: null }, async (run) => {
    const { text, notes } = await run(question);
    assertEquals(text, "Hello\n");
    assertStringIncludes(notes[0], "no chat template");
    await assertRejects(() => run({ ...question, system: "be" }), FleetError, "--system");
  });
});

Deno.test("ask tells in words what went wrong, also in mid-answer", async () => {
  await withFleet({}, async (run, engine) => {
    engine.script = () => ({
      text: "Hel",
      failure: new FleetError("unavailable", "gpu-1 was lost"),
    });
    await assertRejects(() => run(question), FleetError, "gpu-1 was lost");
    engine.refusal = { after: 0, error: new FleetError("overloaded", "The queue is full") };
    await assertRejects(() => run(question), FleetError, "The queue is full");
  });
  await withFleet({ apiKeys: ["the-key"] }, async (run) => {
    await assertRejects(() => run(question), FleetError, "--api-key-file");
    assertEquals((await run(question, "the-key")).text, "Hello\n");
  });
  const nobody = { url: "http://127.0.0.1:1", key: null };
  const silent = { write: () => {}, note: () => {} };
  await assertRejects(() => ask(nobody, question, silent), FleetError, "No coordinator answers");
});
