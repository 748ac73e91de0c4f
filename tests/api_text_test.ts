/** The API with a real checkpoint's tokenizer and chat template, the tokens scripted. */
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import type { Engine, GenerateEvent, GenerateRequest } from "../coordinator/engine.ts";
import { Metrics } from "../coordinator/metrics.ts";
import { createApi } from "../coordinator/api/mod.ts";
import { createChatTemplate } from "../shared/chat_template.ts";
import { parseTokenizerConfig } from "../shared/checkpoint/mod.ts";
import { systemClock } from "../shared/clock.ts";
import { createTokenizer } from "../shared/tokenizer.ts";
import { snapshotFixture } from "./snapshot_fixture.ts";

const directory = new URL("../../shared/models/story-16m/", import.meta.url);
const read = (name: string) => Deno.readTextFileSync(new URL(name, directory));
const ignore = !present();
if (ignore) console.warn(`Skipped: no model in ${directory.pathname}`);

function present(): boolean {
  try {
    return Deno.statSync(new URL("tokenizer.json", directory)).isFile;
  } catch {
    return false;
  }
}

/** An engine that answers with the tokens of `answer`, then the first end token. */
function realTextApi(answer: string) {
  const config = JSON.parse(read("config.json"));
  const configText = read("tokenizer_config.json");
  const tokenizer = createTokenizer(read("tokenizer.json"), configText);
  const { bosToken, eosToken } = parseTokenizerConfig(configText);
  const requests: GenerateRequest[] = [];
  const eos: number[] = [config.eos_token_id].flat();
  const engine: Engine = {
    model: {
      id: "story",
      createdUnix: 0,
      contextTokens: config.max_position_embeddings,
      vocabSize: config.vocab_size,
      eosTokens: eos,
      bosToken: tokenizer.bosToken,
    },
    async *generate(request): AsyncGenerator<GenerateEvent> {
      requests.push(request);
      for (const token of [...tokenizer.encode(answer), eos[0]]) {
        await Promise.resolve();
        yield { type: "token", token, logprob: -1, alternatives: [] };
      }
      yield { type: "finish", reason: "stop" };
    },
    snapshot: snapshotFixture,
    readiness: () => Promise.resolve({ ready: true, reason: "" }),
    onChange: () => () => {},
  };
  const app = createApi({
    engine,
    tokenizer,
    chatTemplate: createChatTemplate(JSON.parse(configText).chat_template, {
      bosToken: bosToken ?? "",
      eosToken: eosToken ?? "",
      clock: systemClock,
    }),
    clock: systemClock,
    randomSeed: () => 1n,
    apiKeys: [],
    metrics: new Metrics(),
    log: () => {},
  });
  const post = (path: string, body: object) =>
    app.request(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "story", ...body }),
    });
  return { post, requests, tokenizer };
}

const messages = [{ role: "user", content: "Tell me a story." }];

Deno.test({
  name: "a prompt has one BOS in front, from the template or from the tokenizer, ids have theirs",
  ignore,
  fn: async () => {
    const { post, requests, tokenizer } = realTextApi("Once.");
    await post("/v1/chat/completions", { messages });
    await post("/v1/completions", { prompt: "Once upon a time" });
    await post("/v1/completions", { prompt: [17, 18] });
    const [chat, text, ids] = requests.map((request) => [...request.promptTokens]);
    for (const tokens of [chat, text]) {
      assertEquals(tokens[0], tokenizer.bosToken);
      assertEquals(tokens.filter((token) => token === tokenizer.bosToken).length, 1);
    }
    assertEquals(ids, [17, 18]);
    assertStringIncludes(tokenizer.decode(chat), "Tell me a story.");
  },
});

Deno.test({
  name: "an answer comes back as it was, whole or streamed, whatever its characters",
  ignore,
  fn: async () => {
    const answer = " The fox — “Zoë” 🦊 — said: naïve café!\n日本語 👩‍👩‍👧";
    const { post } = realTextApi(answer);
    const whole = await (await post("/v1/chat/completions", { messages })).json();
    assertEquals(whole.choices[0].message.content, answer);
    const streamed = await (await post("/v1/chat/completions", { messages, stream: true })).text();
    const pieces = [...streamed.matchAll(/^data: (\{.*)$/gm)].map(([, json]) =>
      JSON.parse(json).choices[0].delta.content ?? ""
    );
    assertEquals(pieces.join(""), answer);
    assert(pieces.every((piece) => !piece.includes("\ufffd")));
    const stopped = await (await post("/v1/completions", { prompt: "x", stop: "fé!\n日" })).json();
    assertEquals(stopped.choices[0].text, answer.slice(0, answer.indexOf("fé!")));
  },
});

Deno.test({
  name: "log-probabilities' bytes make up the answer's bytes",
  ignore,
  fn: async () => {
    const answer = " naïve 🦊 日本";
    const { post } = realTextApi(answer);
    const body = await (await post("/v1/chat/completions", { messages, logprobs: true })).json();
    const bytes = body.choices[0].logprobs.content.flatMap((each: { bytes: number[] }) =>
      each.bytes
    );
    assertEquals(new TextDecoder().decode(Uint8Array.from(bytes)), answer);
  },
});

Deno.test({
  name: "a prompt far beyond the context is refused before it is tokenized to its end",
  ignore,
  fn: async () => {
    const { post } = realTextApi("x");
    const response = await post("/v1/completions", { prompt: "story ".repeat(500_000) });
    assertEquals(response.status, 400);
    assertEquals((await response.json()).error.code, "context_length_exceeded");
  },
});
