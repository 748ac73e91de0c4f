/** The API against OpenAI's own client, over a real listener. */
import OpenAI from "openai";
import { assert, assertEquals, assertInstanceOf, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { scriptedApi, ScriptedEngine, serveOnLoopback } from "./api_fixture.ts";

const chat = {
  model: "scripted",
  messages: [{ role: "user" as const, content: "Hi" }],
};

async function withClient(
  use: (client: OpenAI, engine: ScriptedEngine) => Promise<void>,
  apiKeys: string[] = ["the-key"],
) {
  const { app, engine } = scriptedApi({ apiKeys });
  const served = serveOnLoopback(app);
  const client = new OpenAI({
    baseURL: `${served.url}/v1`,
    apiKey: "the-key",
    maxRetries: 0,
    dangerouslyAllowBrowser: true,
  });
  try {
    await use(client, engine);
  } finally {
    await served.stop();
  }
}

Deno.test("openai client: answers, choices, log-probabilities, models", () =>
  withClient(async (client) => {
    const answer = await client.chat.completions.create({
      ...chat,
      n: 2,
      seed: 7,
      logprobs: true,
      top_logprobs: 1,
    });
    assertEquals(answer.choices.map((choice) => choice.message.content), ["Hello", "Hello"]);
    assertEquals(answer.choices[1].logprobs?.content?.[0].top_logprobs[0].token, "H");
    assertEquals(answer.usage?.completion_tokens, 12);
    const text = await client.completions.create({
      model: "scripted",
      prompt: [1, 2],
      logprobs: 0,
    });
    assertEquals(text.choices[0].text, "Hello");
    const models = await client.models.list();
    assertEquals(models.data.map((model) => model.id), ["scripted"]);
  }));

Deno.test("openai client: streams, with usage at the end", () =>
  withClient(async (client) => {
    const stream = await client.chat.completions.create({
      ...chat,
      n: 2,
      stream: true,
      stream_options: { include_usage: true },
    });
    const texts = ["", ""];
    const finishes: (string | null)[] = [null, null];
    let tokens: number | undefined;
    for await (const chunk of stream) {
      tokens = chunk.usage?.completion_tokens ?? tokens;
      for (const { index, delta, finish_reason } of chunk.choices) {
        texts[index] += delta.content ?? "";
        finishes[index] ??= finish_reason;
      }
    }
    assertEquals([texts, finishes, tokens], [["Hello", "Hello"], ["stop", "stop"], 12]);
    const completion = await client.completions.create({
      model: "scripted",
      prompt: "Hi",
      stream: true,
    });
    let text = "";
    for await (const chunk of completion) text += chunk.choices[0].text;
    assertEquals(text, "Hello");
  }));

Deno.test("openai client: its stream helper adds up to the whole answer", () =>
  withClient(async (client) => {
    const runner = client.chat.completions.stream(chat);
    assertEquals(await runner.finalContent(), "Hello");
  }));

Deno.test("openai client: each failure is the error class that its users catch", () =>
  withClient(async (client, engine) => {
    const thrown = (changes: object) =>
      assertRejects(
        () => client.chat.completions.create({ ...chat, ...changes }) as Promise<unknown>,
        OpenAI.APIError,
      );
    const refused = await thrown({ tools: [{ type: "function", function: { name: "f" } }] });
    assertInstanceOf(refused, OpenAI.BadRequestError);
    assertEquals([refused.param, refused.type], ["tools", "invalid_request_error"]);
    const absent = await thrown({ model: "gpt" });
    assertInstanceOf(absent, OpenAI.NotFoundError);
    assertEquals(absent.code, "model_not_found");
    const long = await thrown({ messages: [{ role: "user", content: "x".repeat(600) }] });
    assertEquals([long.status, long.code], [400, "context_length_exceeded"]);
    engine.refusal = { after: 0, error: new FleetError("overloaded", "The queue is full") };
    const full = await thrown({});
    assertInstanceOf(full, OpenAI.RateLimitError);
    assertEquals(full.headers?.get("retry-after"), "1");
    engine.refusal = { after: 0, error: new FleetError("unavailable", "No pipeline serves") };
    const down = await thrown({});
    assertInstanceOf(down, OpenAI.InternalServerError);
    assertEquals(down.status, 503);
    assertInstanceOf(
      await assertRejects(() => client.withOptions({ apiKey: "wrong" }).models.list()),
      OpenAI.AuthenticationError,
    );
  }));

Deno.test("openai client: a failure in mid-stream is thrown after the text that came", () =>
  withClient(async (client, engine) => {
    engine.script = () => ({ text: "Hel", failure: new FleetError("unavailable", "Lost") });
    const stream = await client.chat.completions.create({ ...chat, stream: true });
    let text = "";
    const error = await assertRejects(async () => {
      for await (const chunk of stream) text += chunk.choices[0].delta.content ?? "";
    }, OpenAI.APIError);
    assertEquals(text, "Hel");
    assert(error.message.includes("Lost"));
  }));

Deno.test("openai client: breaking off, streaming or waiting, ends the sequence", () =>
  withClient(async (client, engine) => {
    engine.script = () => ({ text: "Hel", hang: true });
    const stream = await client.chat.completions.create({ ...chat, stream: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content === "l") break;
    await engine.until(() => engine.aborted === 1);
    const leaving = new AbortController();
    const waiting = assertRejects(
      () => client.chat.completions.create(chat, { signal: leaving.signal }) as Promise<unknown>,
      OpenAI.APIUserAbortError,
    );
    await engine.until(() => engine.requests.length === 2);
    leaving.abort();
    await waiting;
    await engine.until(() => engine.aborted === 2);
  }));

Deno.test("64 streaming clients at once: all finish, none gets another's text", () =>
  withClient(async (client, engine) => {
    engine.script = ({ promptTokens }) => ({
      text: `answer to ${String.fromCharCode(...promptTokens)}`,
    });
    const one = async (name: number) => {
      const stream = await client.completions.create({
        model: "scripted",
        prompt: [...`p${name}`].map((c) => c.charCodeAt(0)),
        max_tokens: 40,
        stream: true,
      });
      let text = "";
      for await (const chunk of stream) text += chunk.choices[0].text;
      return text;
    };
    const texts = await Promise.all(Array.from({ length: 64 }, (_, name) => one(name)));
    assertEquals(texts, Array.from({ length: 64 }, (_, name) => `answer to p${name}`));
  }));
