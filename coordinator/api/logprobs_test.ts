import { assertEquals } from "@std/assert";
import { byteTokenizer } from "../../tests/api_fixture.ts";
import { chatLogprobs, completionLogprobs } from "./logprobs.ts";

const drawn = (token: number, logprob: number, alternatives: [number, number][] = []) => ({
  offset: 0,
  entry: {
    type: "token" as const,
    token,
    logprob,
    alternatives: alternatives.map(([token, logprob]) => ({ token, logprob })),
  },
});

Deno.test("a token that cannot come has a number that JSON can hold", () => {
  const tokens = [drawn(65, -0.5, [[65, -0.5], [66, -Infinity]])];
  const [chat] = chatLogprobs(byteTokenizer, tokens).content;
  assertEquals(chat.top_logprobs.map((each) => each.logprob), [-0.5, -9999]);
  assertEquals(completionLogprobs(byteTokenizer, tokens).top_logprobs, [{ A: -0.5, B: -9999 }]);
});

Deno.test("the drawn token stands among its alternatives, though it was none of the likeliest", () => {
  const tokens = [drawn(90, -8, [[65, -0.1]])];
  assertEquals(completionLogprobs(byteTokenizer, tokens).top_logprobs, [{ A: -0.1, Z: -8 }]);
  const [chat] = chatLogprobs(byteTokenizer, tokens).content;
  assertEquals([chat.token, chat.top_logprobs.map((each) => each.token)], ["Z", ["A"]]);
});
