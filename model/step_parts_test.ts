import { assert, assertEquals } from "@std/assert";
import { stepParts } from "./step_parts.ts";

Deno.test("stepParts() cuts long stages into a short head, a body of parts and a short tail", () => {
  assertEquals(stepParts(1), [{ from: 0, to: 1 }, { from: 1, to: 1 }]);
  assertEquals(stepParts(20), [{ from: 0, to: 2 }, { from: 2, to: 16 }, { from: 16, to: 20 }]);
  assertEquals(stepParts(80).map(({ to }) => to), [2, 18, 34, 50, 66, 76, 80]);
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
