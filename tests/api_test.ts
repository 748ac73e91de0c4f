import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { LIMITS } from "../shared/limits.ts";
import { BOS, EOS, scriptedApi, ScriptedEngine } from "./api_fixture.ts";
import { snapshotFixture } from "./snapshot_fixture.ts";

const CHAT = "/v1/chat/completions";
const COMPLETIONS = "/v1/completions";
const hello = { model: "scripted", messages: [{ role: "user", content: "Hi" }] };
const prompt = { model: "scripted", prompt: "Hi" };

type App = ReturnType<typeof scriptedApi>["app"];

function post(app: App, path: string, body: unknown, signal?: AbortSignal) {
  return app.request(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: typeof body === "string" || body instanceof Uint8Array
      ? body as BodyInit
      : JSON.stringify(body),
    signal,
  });
}

/** The payloads of a stream's data events. */
async function payloads(response: Response): Promise<string[]> {
  assertStringIncludes(response.headers.get("content-type") ?? "", "text/event-stream");
  const text = await response.text();
  return text.split("\n\n").filter((event) => event.startsWith("data: ")).map((event) =>
    event.slice("data: ".length)
  );
}

async function refusal(response: Response) {
  const { error = {} } = await response.json();
  return { status: response.status, param: error.param, code: error.code, message: error.message };
}

Deno.test("chat: an answer has text, finish reason and counts, and no BOS is added", async () => {
  const { app, engine } = scriptedApi();
  const response = await post(app, CHAT, hello);
  const body = await response.json();
  assertEquals(response.status, 200);
  assertEquals(body.object, "chat.completion");
  assertEquals(body.choices, [{
    index: 0,
    message: { role: "assistant", content: "Hello", refusal: null },
    logprobs: null,
    finish_reason: "stop",
  }]);
  const rendered = "<user>Hi<assistant>";
  assertEquals(body.usage, {
    prompt_tokens: rendered.length,
    completion_tokens: 6,
    total_tokens: rendered.length + 6,
  });
  assertEquals(
    new TextDecoder().decode(Uint8Array.from(engine.requests[0].promptTokens)),
    rendered,
  );
});

Deno.test("chat: text parts are joined and developer is the system role", async () => {
  const { app, engine } = scriptedApi();
  const parts = [{ type: "text", text: "a" }, { type: "text", text: "b" }];
  const messages = [{ role: "developer", content: "be" }, { role: "user", content: parts }];
  await post(app, CHAT, { ...hello, messages });
  assertEquals(
    new TextDecoder().decode(Uint8Array.from(engine.requests[0].promptTokens)),
    "<system>be<user>a\nb<assistant>",
  );
});

Deno.test("completions: text gets the BOS, token ids are taken as they are", async () => {
  const { app, engine } = scriptedApi();
  await post(app, COMPLETIONS, prompt);
  await post(app, COMPLETIONS, { ...prompt, prompt: [72, 105] });
  await post(app, COMPLETIONS, { ...prompt, prompt: ["a", "b"] });
  await post(app, COMPLETIONS, { ...prompt, prompt: [[1], [2, 3]] });
  assertEquals(engine.requests.map((request) => [...request.promptTokens]), [
    [BOS, 72, 105],
    [72, 105],
    [BOS, 97],
    [BOS, 98],
    [1],
    [2, 3],
  ]);
  assert(engine.requests.every((request) => request.maxTokens === 16));
});

Deno.test("what is asked reaches the engine; what is not has OpenAI's defaults", async () => {
  const { app, engine } = scriptedApi();
  await post(app, CHAT, hello);
  await post(app, CHAT, {
    ...hello,
    temperature: 0.5,
    top_p: 0.9,
    top_k: 40,
    seed: -1,
    presence_penalty: 1,
    frequency_penalty: -1,
    logit_bias: { "65": 2.5 },
    max_completion_tokens: 7,
    max_tokens: 9,
    n: 2,
    logprobs: true,
    top_logprobs: 3,
  });
  const [plain, full, second] = engine.requests;
  assertEquals(plain, {
    promptTokens: plain.promptTokens,
    maxTokens: 512,
    temperature: 1,
    topP: 1,
    topK: 0,
    seed: 0xabc0n,
    choice: 0,
    presencePenalty: 0,
    frequencyPenalty: 0,
    bias: new Map(),
    alternatives: 0,
    stopTokens: [EOS],
  });
  assertEquals(full, {
    promptTokens: full.promptTokens,
    maxTokens: 7,
    temperature: 0.5,
    topP: 0.9,
    topK: 40,
    seed: 2n ** 64n - 1n,
    choice: 0,
    presencePenalty: 1,
    frequencyPenalty: -1,
    bias: new Map([[65, 2.5]]),
    alternatives: 3,
    stopTokens: [EOS],
  });
  assertEquals(second, { ...full, choice: 1 });
});

Deno.test("top_p 0 draws the likeliest token alone", async () => {
  const { app, engine } = scriptedApi();
  await post(app, CHAT, { ...hello, top_p: 0 });
  assertEquals([engine.requests[0].topP, engine.requests[0].topK], [1, 1]);
});

Deno.test("n choices of several prompts: each with its index, a prompt's choices share a seed", async () => {
  const { app, engine } = scriptedApi();
  engine.script = ({ promptTokens, choice }) => ({
    text: `${String.fromCharCode(promptTokens[1])}${choice}`,
  });
  const response = await post(app, COMPLETIONS, { ...prompt, prompt: ["a", "b"], n: 2 });
  const { choices, usage } = await response.json();
  assertEquals(
    choices.map((each: { index: number; text: string }) => [each.index, each.text]),
    [[0, "a0"], [1, "a1"], [2, "b0"], [3, "b1"]],
  );
  assertEquals(usage, { prompt_tokens: 4, completion_tokens: 12, total_tokens: 16 });
  const [a0, a1, b0] = engine.requests.map((request) => request.seed);
  assert(a0 === a1 && a0 !== b0);
});

Deno.test("chat stream: role, pieces, finish, usage, [DONE]", async () => {
  const { app } = scriptedApi();
  const events = await payloads(
    await post(app, CHAT, { ...hello, stream: true, stream_options: { include_usage: true } }),
  );
  assertEquals(events.pop(), "[DONE]");
  const chunks = events.map((event) => JSON.parse(event));
  assert(chunks.every((chunk) => chunk.object === "chat.completion.chunk"));
  assertEquals(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  const last = chunks.pop();
  assertEquals([last.choices, last.usage.completion_tokens], [[], 6]);
  assert(chunks.every((chunk) => chunk.usage === null));
  const deltas = chunks.map((chunk) => chunk.choices[0].delta);
  assertEquals(deltas[0], { role: "assistant", content: "", refusal: null });
  assertEquals(deltas.slice(1, -1).map((delta) => delta.content), [..."Hello"]);
  assertEquals(chunks.at(-1).choices[0], {
    index: 0,
    delta: {},
    logprobs: null,
    finish_reason: "stop",
  });
});

Deno.test("a stream never breaks a character, and its pieces make up the whole answer", async () => {
  const { app, engine } = scriptedApi();
  engine.script = () => ({ text: "Zoë 🦊 – “quoted”" });
  const events = await payloads(
    await post(app, COMPLETIONS, { ...prompt, max_tokens: 99, stream: true }),
  );
  const texts = events.slice(0, -1).map((event) => JSON.parse(event).choices[0].text);
  assertEquals(texts.join(""), "Zoë 🦊 – “quoted”");
  assert(texts.every((text) => !text.includes("\ufffd")));
});

Deno.test("an answer that max_tokens cuts inside a character ends with a replacement mark", async () => {
  const { app, engine } = scriptedApi();
  engine.script = () => ({ text: "a🦊" });
  const body = await (await post(app, COMPLETIONS, { ...prompt, max_tokens: 3 })).json();
  assertEquals(body.choices[0].text, "a\ufffd");
  assertEquals(body.choices[0].finish_reason, "length");
});

Deno.test("a stop string across tokens is cut out and ends the sequence", async () => {
  const { app, engine } = scriptedApi();
  engine.script = () => ({ text: "one\n\ntwo and more", hang: true });
  const streamed = await payloads(
    await post(app, CHAT, { ...hello, stop: ["\n\ntw"], stream: true }),
  );
  const choices = streamed.slice(0, -1).map((event) => JSON.parse(event).choices[0]);
  assertEquals(choices.map((choice) => choice.delta.content ?? "").join(""), "one");
  assertEquals(choices.at(-1).finish_reason, "stop");
  assertEquals(engine.aborted, 1);
  const body = await (await post(app, CHAT, { ...hello, stop: "two" })).json();
  assertEquals(body.choices[0].message.content, "one\n\n");
  assertEquals(body.usage.completion_tokens, 8);
});

Deno.test("one choice's stop string leaves the other choices alone", async () => {
  const { app, engine } = scriptedApi();
  engine.script = ({ choice }) => ({ text: choice === 0 ? "ab" : "cd", hang: choice === 0 });
  const body = await (await post(app, CHAT, { ...hello, n: 2, stop: "b" })).json();
  assertEquals(
    body.choices.map((choice: { message: { content: string } }) => choice.message.content),
    ["a", "cd"],
  );
});

Deno.test("chat log-probabilities: one entry per token, bytes, alternatives", async () => {
  const { app, engine } = scriptedApi();
  engine.script = () => ({ text: "é!" });
  const body = await (await post(app, CHAT, { ...hello, logprobs: true, top_logprobs: 2 })).json();
  const { content } = body.choices[0].logprobs;
  assertEquals(content.map((each: { token: string }) => each.token), ["\\xc3", "\\xa9", "!"]);
  assertEquals(content[2].bytes, [33]);
  assertEquals(content[2].logprob, -0.52);
  assertEquals(content[2].top_logprobs.map((each: { token: string }) => each.token), ["!", '"']);
});

Deno.test("streamed log-probabilities stand beside the text they belong to", async () => {
  const { app, engine } = scriptedApi();
  engine.script = () => ({ text: "aé" });
  const events = await payloads(await post(app, CHAT, { ...hello, logprobs: true, stream: true }));
  const choices = events.slice(0, -1).map((event) => JSON.parse(event).choices[0]);
  const grown = choices.filter((choice) => choice.delta.content);
  assertEquals(grown.map((choice) => [choice.delta.content, choice.logprobs.content.length]), [
    ["a", 1],
    ["é", 2],
  ]);
});

Deno.test("completions log-probabilities have the older shape, with offsets", async () => {
  const { app, engine } = scriptedApi();
  engine.script = () => ({ text: "éb" });
  const body = await (await post(app, COMPLETIONS, { ...prompt, logprobs: 1 })).json();
  assertEquals(body.choices[0].logprobs, {
    tokens: ["bytes:\\xc3", "bytes:\\xa9", "b"],
    token_logprobs: [-0.5, -0.51, -0.52],
    top_logprobs: [{ "bytes:\\xc3": -0.5 }, { "bytes:\\xa9": -0.51 }, { b: -0.52 }],
    text_offset: [0, 0, 1],
  });
});

Deno.test("what cannot change the answer is accepted", async () => {
  const { app } = scriptedApi();
  const response = await post(app, CHAT, {
    ...hello,
    user: "u",
    metadata: { a: "b" },
    store: true,
    service_tier: "auto",
    parallel_tool_calls: true,
    tools: [],
    tool_choice: "none",
    functions: null,
    response_format: { type: "text" },
    modalities: ["text"],
    stop: null,
    temperature: null,
    prediction: null,
    stream_options: null,
  });
  assertEquals(response.status, 200);
  assertEquals(
    (await post(app, COMPLETIONS, { ...prompt, echo: false, suffix: "", best_of: 2, n: 2 })).status,
    200,
  );
});

Deno.test("what would change the answer and is not supported is refused by name", async () => {
  const { app, engine } = scriptedApi();
  const cases: [string, Record<string, unknown>, string][] = [
    [CHAT, { tools: [{ type: "function" }] }, "tools"],
    [CHAT, { functions: [{}] }, "functions"],
    [CHAT, { tool_choice: "required" }, "tool_choice"],
    [CHAT, { response_format: { type: "json_object" } }, "response_format.type"],
    [CHAT, { modalities: ["text", "audio"] }, "modalities[1]"],
    [CHAT, { audio: { voice: "x" } }, "audio"],
    [CHAT, { reasoning_effort: "low" }, "reasoning_effort"],
    [CHAT, { min_p: 0.1 }, "min_p"],
    [CHAT, { prompt: "Hi" }, "prompt"],
    [
      CHAT,
      { messages: [{ role: "user", content: [{ type: "image_url" }] }] },
      "messages[0].content",
    ],
    [CHAT, { messages: [{ role: "tool", content: "x" }] }, "messages[0].role"],
    [CHAT, { messages: [{ role: "user", content: "x", mood: 1 }] }, "messages[0].mood"],
    [CHAT, { stream_options: { other: 1 } }, "stream_options.other"],
    [COMPLETIONS, { echo: true }, "echo"],
    [COMPLETIONS, { suffix: "x" }, "suffix"],
    [COMPLETIONS, { best_of: 3 }, "best_of"],
    [COMPLETIONS, { messages: [] }, "messages"],
  ];
  for (const [path, change, param] of cases) {
    const base = path === CHAT ? hello : prompt;
    const { status, param: named, message } = await refusal(
      await post(app, path, { ...base, ...change }),
    );
    assertEquals([status, named], [400, param]);
    assertStringIncludes(message, param);
  }
  assertEquals(engine.requests.length, 0);
});

Deno.test("wrong types and ranges are refused by name", async () => {
  const { app, engine } = scriptedApi();
  const cases: [Record<string, unknown>, string][] = [
    [{ temperature: 2.1 }, "temperature"],
    [{ temperature: "1" }, "temperature"],
    [{ top_p: -0.1 }, "top_p"],
    [{ n: 0 }, "n"],
    [{ n: LIMITS.maxChoices + 1 }, "n"],
    [{ seed: 1.5 }, "seed"],
    [{ presence_penalty: 3 }, "presence_penalty"],
    [{ logit_bias: { hello: 1 } }, "logit_bias.hello"],
    [{ logit_bias: { "1": 101 } }, "logit_bias.1"],
    [{ logit_bias: { "258": 1 } }, "logit_bias"],
    [{ stop: ["a", "b", "c", "d", "e"] }, "stop"],
    [{ stop: "" }, "stop"],
    [{ max_tokens: 0 }, "max_tokens"],
    [{ top_logprobs: 2 }, "top_logprobs"],
    [{ logprobs: true, top_logprobs: 21 }, "top_logprobs"],
    [{ messages: [] }, "messages"],
    [{ messages: "Hi" }, "messages"],
    [{ messages: [{ role: "user", content: "" }] }, "messages"],
    [{ stream: "yes" }, "stream"],
    [{ model: undefined }, "model"],
  ];
  for (const [change, param] of cases) {
    const { status, param: named } = await refusal(await post(app, CHAT, { ...hello, ...change }));
    assertEquals([status, named], [400, param], JSON.stringify(change));
  }
  for (const wrong of ["", [], [[]], [1.5], [-1], ["a", 1], [[1], "a"], 7, undefined]) {
    const { status, param: named } = await refusal(
      await post(app, COMPLETIONS, { ...prompt, prompt: wrong }),
    );
    // An empty text is the BOS alone: that is a prompt.
    if (wrong === "") assertEquals(status, 200);
    else assert(status === 400 && named.startsWith("prompt"), JSON.stringify(wrong));
  }
  assertEquals(
    (await refusal(await post(app, COMPLETIONS, { ...prompt, prompt: [258] }))).param,
    "prompt",
  );
  assertEquals(engine.requests.length, 1);
});

Deno.test("bodies that are no JSON, no UTF-8, no object, too deep or too long", async () => {
  const { app } = scriptedApi();
  const cases: [string | Uint8Array, number][] = [
    ["{", 400],
    ["", 400],
    ["[]", 400],
    ["null", 400],
    ["[".repeat(100_000), 400],
    [`{"a":${"[".repeat(100_000)}${"]".repeat(100_000)}}`, 400],
    [Uint8Array.of(0x7b, 0x22, 0xff, 0x22, 0x7d), 400],
    [" ".repeat(LIMITS.maxBodyBytes + 1), 413],
  ];
  for (const [body, expected] of cases) {
    const { status, message } = await refusal(await post(app, CHAT, body));
    assertEquals(status, expected);
    assert(message.length > 10);
  }
});

Deno.test("a body without end is refused as soon as it is too long", async () => {
  const { app } = scriptedApi();
  let sent = 0, cancelled = false;
  const body = new ReadableStream<Uint8Array>({
    pull(controller) {
      sent += 65_536;
      controller.enqueue(new Uint8Array(65_536).fill(32));
    },
    cancel: () => {
      cancelled = true;
    },
  });
  const response = await app.request(CHAT, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body,
    // @ts-expect-error: a stream as a body needs it, the type of RequestInit lacks it.
    duplex: "half",
  });
  assertEquals(response.status, 413);
  assert(cancelled && sent < LIMITS.maxBodyBytes + 4 * 65_536);
});

Deno.test("a form of another origin cannot post: the body must say that it is JSON", async () => {
  const { app } = scriptedApi();
  const response = await app.request(CHAT, { method: "POST", body: JSON.stringify(hello) });
  assertEquals((await refusal(response)).status, 415);
});

Deno.test("the world's failures have their status and OpenAI's shape", async () => {
  const cases: [FleetError, number, string][] = [
    [new FleetError("overloaded", "The queue is full"), 429, "overloaded"],
    [new FleetError("unavailable", "No pipeline serves"), 503, "unavailable"],
    [new FleetError("too-large", "It can never fit"), 400, "context_length_exceeded"],
  ];
  for (const [error, status, code] of cases) {
    const { app, engine } = scriptedApi();
    engine.refusal = { after: 0, error };
    for (const stream of [false, true]) {
      const response = await post(app, CHAT, { ...hello, stream });
      assertEquals(response.headers.get("retry-after"), status === 400 ? null : "1");
      const told = await refusal(response);
      assertEquals([told.status, told.code, told.message], [status, code, error.message]);
    }
  }
});

Deno.test("when the third choice is refused, the first two are called off", async () => {
  const { app, engine } = scriptedApi();
  engine.refusal = { after: 2, error: new FleetError("overloaded", "The queue is full") };
  const response = await post(app, CHAT, { ...hello, n: 3, stream: true });
  assertEquals(response.status, 429);
  assertEquals(engine.aborted, 2);
});

Deno.test("a failure in mid-stream is a data event, and no [DONE] follows", async () => {
  const { app, engine } = scriptedApi();
  engine.script = ({ choice }) => ({
    text: "Hel",
    ...(choice === 0 ? { hang: true } : { failure: new FleetError("unavailable", "Lost") }),
  });
  const events = await payloads(await post(app, CHAT, { ...hello, n: 2, stream: true }));
  assertEquals(JSON.parse(events.at(-1)!), {
    error: { message: "Lost", type: "server_error", param: null, code: "unavailable" },
  });
  assertEquals(engine.aborted, 2);
  const whole = await post(app, CHAT, { ...hello, n: 2 });
  assertEquals((await refusal(whole)).status, 503);
});

Deno.test("a defect of ours tells the client nothing and the log everything", async () => {
  const { app, engine, log } = scriptedApi();
  engine.script = () => {
    throw new TypeError("secret detail");
  };
  const { status, message } = await refusal(await post(app, CHAT, hello));
  assertEquals(status, 500);
  assert(!message.includes("secret"));
  assertStringIncludes(log.join("\n"), "secret detail");
});

Deno.test("a client that goes away ends its sequences, streaming or waiting", async () => {
  const { app, engine } = scriptedApi();
  engine.script = () => ({ text: "Hel", hang: true });
  const streamed = await post(app, CHAT, { ...hello, n: 2, stream: true });
  const reader = streamed.body!.getReader();
  await reader.read();
  await reader.cancel();
  assertEquals(engine.aborted, 2);
  const leaving = new AbortController();
  const waiting = post(app, CHAT, hello, leaving.signal);
  await engine.until(() => engine.requests.length === 3);
  leaving.abort();
  assertEquals((await waiting).status, 499);
  assertEquals(engine.aborted, 3);
});

Deno.test("a model that is not here is 404; a model without a template serves completions only", async () => {
  const { app } = scriptedApi({ chatTemplate: null });
  assertEquals(await refusal(await post(app, COMPLETIONS, { ...prompt, model: "gpt" })), {
    status: 404,
    param: "model",
    code: "model_not_found",
    message: 'The model "gpt" is not here; this fleet serves "scripted"',
  });
  const { status, message } = await refusal(await post(app, CHAT, hello));
  assertEquals(status, 400);
  assertStringIncludes(message, "no chat template");
  assertEquals((await post(app, COMPLETIONS, prompt)).status, 200);
});

Deno.test("a prompt longer than the context is refused with the code that clients know", async () => {
  const { app } = scriptedApi();
  const told = await refusal(await post(app, COMPLETIONS, { ...prompt, prompt: "x".repeat(600) }));
  assertEquals([told.status, told.code], [400, "context_length_exceeded"]);
  assertStringIncludes(told.message, "601");
});

Deno.test("models: the list, the one, and none other", async () => {
  const { app } = scriptedApi();
  const list = await (await app.request("/v1/models")).json();
  const one = await (await app.request("/v1/models/scripted")).json();
  assertEquals(list, { object: "list", data: [one] });
  assertEquals([one.id, one.object, one.context_tokens, one.chat], [
    "scripted",
    "model",
    512,
    true,
  ]);
  assertEquals((await app.request("/v1/models/other/name")).status, 404);
});

Deno.test("unknown routes are 404 and wrong methods 405, in OpenAI's shape", async () => {
  const { app } = scriptedApi();
  assertEquals((await refusal(await app.request("/v2/nothing"))).code, "not_found");
  const response = await app.request(CHAT);
  assertEquals(response.headers.get("allow"), "POST");
  assertEquals((await refusal(response)).code, "method_not_allowed");
});

Deno.test("with keys set, everything but health and the empty page needs one", async () => {
  const { app } = scriptedApi({ apiKeys: ["first-key", "second-key"] });
  const status = async (path: string, authorization?: string) => {
    const response = await app.request(path, { headers: authorization ? { authorization } : {} });
    await response.body?.cancel();
    return response.status;
  };
  for (const path of ["/v1/models", "/fleet", "/events", "/metrics"]) {
    assertEquals(await status(path), 401);
    assertEquals(await status(path, "Bearer first-ke"), 401);
    assertEquals(await status(path, "Basic first-key"), 401);
    assertEquals(await status(path, "Bearer first-key"), 200);
    assertEquals(await status(path, "Bearer second-key"), 200);
  }
  for (const path of ["/", "/monitor/page.js", "/healthz", "/readyz"]) {
    assertEquals(await status(path), 200);
  }
  assertEquals((await post(app, CHAT, hello)).status, 401);
});

Deno.test("readyz says why", async () => {
  const { app, engine } = scriptedApi();
  assertEquals((await app.request("/healthz")).status, 200);
  assertEquals((await app.request("/readyz")).status, 200);
  engine.ready = { ready: false, reason: "No step completed for 9 s" };
  const response = await app.request("/readyz");
  assertEquals(response.status, 503);
  assertEquals(await response.json(), { ready: false, reason: "No step completed for 9 s" });
});

Deno.test("fleet shows the snapshot; metrics count requests and show the stages of the moment", async () => {
  const { app, engine } = scriptedApi();
  assertEquals(
    await (await app.request("/fleet")).json(),
    JSON.parse(JSON.stringify(engine.picture)),
  );
  await post(app, CHAT, hello);
  await app.request("/nowhere");
  const page = async () => await (await app.request("/metrics")).text();
  const first = await page();
  assertMatch(
    first,
    /fleet_http_requests_total\{route="\/v1\/chat\/completions",status="200"\} 1\n/,
  );
  assertMatch(first, /fleet_http_requests_total\{route="other",status="404"\} 1\n/);
  assertMatch(first, /fleet_generated_tokens_total 6\n/);
  assertMatch(first, /fleet_time_to_first_token_seconds_count 1\n/);
  assertMatch(first, /fleet_inter_token_seconds_count 5\n/);
  assertMatch(
    first,
    /stage_latency_ms\{stage="3",worker="gpu-3",part="gpu",quantile="0.99"\} [\d.]+\n/,
  );
  engine.picture = snapshotFixture({ stages: 2 });
  assert(!(await page()).includes('stage="3"'));
});

Deno.test("events: the first snapshot at once, then changes, until the watcher leaves", async () => {
  const { app, engine } = scriptedApi();
  const response = await app.request("/events");
  const reader = response.body!.getReader();
  const next = async () => {
    const { value } = await reader.read();
    return JSON.parse(new TextDecoder().decode(value).slice("data: ".length));
  };
  assertEquals((await next()).plan.epoch, 7);
  assertEquals(engine.listeners, 1);
  engine.show(snapshotFixture({ state: "waiting" }));
  assertEquals((await next()).state, "waiting");
  await reader.cancel();
  assertEquals(engine.listeners, 0);
});

Deno.test("events: one watcher too many is told to come back", async () => {
  const { app, engine } = scriptedApi({ engine: new ScriptedEngine() });
  const watching = await Promise.all(
    Array.from({ length: LIMITS.maxMonitorStreams }, () => app.request("/events")),
  );
  const late = await app.request("/events");
  assertEquals((await refusal(late)).status, 429);
  for (const each of watching) await each.body!.cancel();
  assertEquals(engine.listeners, 0);
  const again = await app.request("/events");
  assertEquals(again.status, 200);
  await again.body!.cancel();
});
