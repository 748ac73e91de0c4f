import { assertEquals } from "@std/assert";
import { ago, bytes, layers, modelLine, ms, percent, plural, rate } from "./format.js";

Deno.test("numbers have about three digits and a unit", () => {
  assertEquals(
    [null, 0.123, 4.56, 123.4, 12_345].map(ms),
    ["–", "0.12 ms", "4.6 ms", "123 ms", "12.3 s"],
  );
  assertEquals([0, 1023, 1536, 22 * 2 ** 30, 500 * 2 ** 20].map(bytes), [
    "0 B",
    "1023 B",
    "1.5 KiB",
    "22.0 GiB",
    "500 MiB",
  ]);
  assertEquals([rate(9.96), rate(1234.5), percent(0.256), percent(null)], [
    "10.0",
    "1,235",
    "26 %",
    "–",
  ]);
  assertEquals([plural(1, "step"), plural(2, "step")], ["1 step", "2 steps"]);
  assertEquals([-5, 59_000, 61_000, 7.3e6, 2e8].map(ago), [
    "0 s ago",
    "59 s ago",
    "1 min ago",
    "2 h ago",
    "2 d ago",
  ]);
});

Deno.test("a model is told with its codes and the kernels that multiply them, if it has codes", () => {
  const model = {
    id: "llama",
    layers: 80,
    bytes: 22 * 2 ** 30,
    format: "m1v4g128",
    decode: "int8",
  };
  assertEquals(modelLine(model), "llama · 80 layers · m1v4g128, int8 · 22.0 GiB");
  const dense = { ...model, layers: 1, format: "float16", decode: null };
  assertEquals(modelLine(dense), "llama · 1 layer · float16 · 22.0 GiB");
});

Deno.test("a stage is named by what it holds", () => {
  const stage = { from: 0, to: 8, first: true, last: true };
  assertEquals(layers(stage), "embedding · layers 0–7 · head");
  assertEquals(layers({ ...stage, to: 1, last: false }), "embedding · layer 0");
  assertEquals(layers({ from: 8, to: 8, first: false, last: true }), "head");
});
