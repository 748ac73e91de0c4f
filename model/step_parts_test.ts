import { assert, assertEquals } from "@std/assert";
import { stepParts } from "./step_parts.ts";

Deno.test("stepParts() cuts long stages into a head of one layer, parts that grow and a short tail", () => {
  assertEquals(stepParts(1), [{ from: 0, to: 1 }, { from: 1, to: 1 }]);
  assertEquals(stepParts(20).map(({ to }) => to), [1, 5, 18, 20]);
  assertEquals(stepParts(80).map(({ to }) => to), [1, 5, 21, 37, 53, 69, 78, 80]);
});

Deno.test("stepParts() covers every layer once, in order, and begins with layers", () => {
  for (let layers = 1; layers <= 200; layers++) {
    let at = 0;
    for (const { from, to } of stepParts(layers)) {
      assert(from === at && (to > from || to === layers), `${from} to ${to} of ${layers}`);
      at = to;
    }
    assertEquals(at, layers);
  }
});
