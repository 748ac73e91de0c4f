import { assertEquals, assertRejects } from "@std/assert";
import { merge } from "./merge.ts";

/** Yields `values`, counts what was asked of it, and ends when told to. */
function source(values: number[], ending?: { error?: Error; until?: Promise<void> }) {
  const seen = { asked: 0, ended: false };
  async function* run() {
    try {
      for (const value of values) {
        seen.asked++;
        yield value;
      }
      await ending?.until;
      if (ending?.error) throw ending.error;
    } finally {
      seen.ended = true;
    }
  }
  return { seen, values: run() };
}

const noEnd = () => {
  throw new Error("the sources ended by themselves");
};

Deno.test("merge yields every value of every source, each source in its order", async () => {
  const sources = [[1, 2, 3], [10], [], [20, 21]].map((values) => source(values).values);
  const got = await Array.fromAsync(merge(sources, noEnd));
  assertEquals(got.filter((value) => value < 10), [1, 2, 3]);
  assertEquals(got.filter((value) => value >= 20), [20, 21]);
  assertEquals(got.length, 6);
});

Deno.test("merge asks a source again only when its value was taken", async () => {
  const fast = source([1, 2, 3, 4]);
  const merged = merge([fast.values], () => {});
  await merged.next();
  await new Promise((resolve) => setTimeout(resolve));
  assertEquals(fast.seen.asked, 1);
  await merged.next();
  assertEquals(fast.seen.asked, 2);
  await merged.return(undefined);
});

Deno.test("a failure comes after the values before it, and ends the other sources", async () => {
  let end = () => {};
  const until = new Promise<void>((resolve) => end = resolve);
  const waiting = source([1], { until });
  const failing = source([2], { error: new Error("lost") });
  const got: number[] = [];
  const reasons: unknown[] = [];
  await assertRejects(
    async () => {
      const merged = merge([waiting.values, failing.values], (reason) => {
        reasons.push(reason);
        end();
      });
      for await (const value of merged) got.push(value);
    },
    Error,
    "lost",
  );
  assertEquals([got.sort(), reasons.length], [[1, 2], 1]);
  await until;
  await new Promise((resolve) => setTimeout(resolve));
  assertEquals(waiting.seen.ended, true);
});

Deno.test("a reader that stops early ends every source", async () => {
  const many = [source([1, 2, 3]), source([4, 5, 6]), source([7, 8, 9])];
  let ends = 0;
  for await (const _ of merge(many.map((each) => each.values), () => ends++)) break;
  await new Promise((resolve) => setTimeout(resolve));
  assertEquals([ends, ...many.map((each) => each.seen.ended)], [1, true, true, true]);
});
