import { assert, assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { type ChatArgs, createChatTemplate } from "./chat_template.ts";
import { VirtualClock } from "./clock.ts";
import { FleetError } from "./errors.ts";

const chatDir = new URL("../../shared/chat/", import.meta.url);
const vectors = readVectors();

function readVectors(): { template: string; case: string; args: ChatArgs; expected: string }[] {
  try {
    return JSON.parse(Deno.readTextFileSync(new URL("llama3-vectors.json", chatDir))).vectors;
  } catch {
    return [];
  }
}

function render(source: string, args: Partial<ChatArgs> = {}, clock = new VirtualClock()): string {
  const template = createChatTemplate(source, { bosToken: "<s>", eosToken: "</s>", clock });
  return template.render({ messages: [], add_generation_prompt: false, ...args });
}

Deno.test({
  name: "Llama 3 to 3.3 templates render every vector as jinja2 does (needs ../shared/chat)",
  ignore: vectors.length === 0,
  fn() {
    for (const vector of vectors) {
      const source = Deno.readTextFileSync(new URL(`templates/${vector.template}.jinja`, chatDir));
      const message = `${vector.template}, ${vector.case}`;
      assertEquals(render(source, vector.args), vector.expected, message);
    }
    assert(vectors.some((vector) => "builtin_tools" in vector.args), "reject was exercised");
  },
});

Deno.test("select and reject take a test with arguments, a bare test, and no test at all", () => {
  const list = ["a", 1, "b", null, ["c"], { d: 1 }, ""];
  assertEquals(render("{{ l | reject('equalto', 'a') | first }}", { l: list }), "1");
  assertEquals(render("{{ l | select('string') | join('+') }}", { l: list }), "a+b+");
  assertEquals(render("{{ l | reject | length }}", { l: list }), "2");
  assertEquals(render("{{ l | select | list | length }}", { l: list }), "5");
  assertEquals(render("{{ (l | select('mapping') | first).d + 1 }}", { l: list }), "2");
  assertEquals(
    render("{% macro f(x) %}{{ x | reject('none') | tojson }}{% endmacro %}{{ f(l) }}", {
      l: [null, [1], "é"],
    }),
    '[[1], "é"]',
  );
  assertThrows(() => render("{{ l | reject('odder') }}", { l: [1] }), FleetError, "odder");
});

Deno.test("a variable named like a filter stays a variable", () => {
  assertEquals(render("{{ reject }}{{ [1] | reject | length }}", { reject: "r" }), "r0");
});

Deno.test("strftime_now shows the injected clock, in UTC", () => {
  const clock = new VirtualClock(Date.UTC(2026, 1, 3, 15, 4, 5));
  const format = "%d %b %Y|%B %A %a|%y-%m %H:%M:%S|%I %p|%%|%Q";
  assertEquals(
    render(`{{ strftime_now('${format}') }}`, {}, clock),
    "03 Feb 2026|February Tuesday Tue|26-02 15:04:05|03 PM|%|%Q",
  );
  assertEquals(render("{{ strftime_now('%d %b %Y') }}"), "31 Dec 2024");
});

Deno.test("blocks take their line's indentation and newline with them", () => {
  assertEquals(render("a\n  {% if true %}\nb\n  {% endif %}\nc\n"), "a\nb\nc");
});

Deno.test("raise_exception becomes a bad request with the template's words", () => {
  const error = assertThrows(
    () => render("{{ raise_exception('Roles must alternate') }}"),
    FleetError,
    "Roles must alternate",
  );
  assertEquals([error.code, error.param], ["bad-request", "messages"]);
});

Deno.test("a template that stumbles over the messages is a bad request too", () => {
  const error = assertThrows(
    () => render("{{ messages[0].content.text.nope() }}", { messages: [{ role: "user" }] }),
    FleetError,
  );
  assertEquals(error.code, "bad-request");
});

Deno.test("a template that does not parse is a bad checkpoint", () => {
  const error = assertThrows(() => render("{% if %}"), FleetError);
  assertEquals(error.code, "bad-checkpoint");
  assertStringIncludes(error.message, "does not parse");
});

Deno.test("keys that hold undefined do not exist for the template", () => {
  const messages = [{ role: "user", content: "x", tool_calls: undefined }];
  const source = "{{ 'tool_calls' in messages[0] }} {{ tools is defined }}";
  assertEquals(render(source, { messages, tools: undefined }), "false false");
});

Deno.test("range() counts as Python's does, and loops over messages keep their state", () => {
  assertEquals(
    render("{{ range(3) | join(',') }} {{ range(5, 0, -2) | join(',') }}"),
    "0,1,2 5,3,1",
  );
  assertEquals(
    render(
      "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ bos_token }}{{ eos_token }}",
      { messages: [{}, {}] },
    ),
    "2<s></s>",
  );
});
