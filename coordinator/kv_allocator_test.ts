import { assert, assertEquals, assertThrows } from "@std/assert";
import { randomInt, seededRandom } from "../shared/random.ts";
import { KvAllocator, pagesFor } from "./kv_allocator.ts";

Deno.test("pagesFor() counts pages of 32 positions", () => {
  assertEquals([0, 1, 32, 33, 64].map(pagesFor), [0, 1, 1, 2, 2]);
});

Deno.test("grow() takes all the pages it needs, or none", () => {
  const kv = new KvAllocator(3);
  assert(kv.grow("a", 64));
  assertEquals(kv.grow("b", 33), false);
  assertEquals([kv.table("b").length, kv.free], [0, 1]);
  assert(kv.grow("b", 32));
  assert(kv.grow("a", 40), "a covers 40 positions already");
  assertEquals(kv.free, 0);
  kv.check();
});

Deno.test("a released page is not handed out while an unfinished step names it", () => {
  const kv = new KvAllocator(2);
  kv.grow("a", 64);
  const [first, second] = kv.table("a");
  kv.pin(1, [first]);
  kv.pin(2, [first]);
  kv.release("a");
  assertEquals([kv.free, kv.leaving, kv.used], [1, 1, 1]);
  assert(kv.grow("b", 32));
  assertEquals(kv.table("b"), [second]);
  kv.unpin(1);
  assertEquals(kv.grow("c", 32), false, "step 2 still names the page");
  kv.unpin(2);
  assert(kv.grow("c", 32));
  assertEquals(kv.table("c"), [first]);
  kv.check();
});

Deno.test("what cannot be is caught at once", () => {
  const kv = new KvAllocator(2);
  assertThrows(() => kv.pin(1, [0]), Error, "nobody's");
  assertThrows(() => kv.unpin(1), Error, "pins nothing");
  assertThrows(() => new KvAllocator(0), Error, "0 pages");
});

Deno.test("no order of calls loses a page or gives it to two", () => {
  const random = seededRandom(3);
  const kv = new KvAllocator(20);
  const names = ["a", "b", "c", "d", "e"];
  let step = 0;
  const unfinished: number[] = [];
  for (let i = 0; i < 3000; i++) {
    const name = names[randomInt(random, names.length)];
    const table = kv.table(name);
    switch (randomInt(random, 4)) {
      case 0:
        kv.grow(name, 1 + randomInt(random, 300));
        break;
      case 1:
        if (random() < 0.3) kv.release(name);
        break;
      case 2:
        if (table.length === 0 || unfinished.length >= 4) break;
        unfinished.push(++step);
        kv.pin(step, table.slice(0, 1 + randomInt(random, table.length)));
        break;
      case 3:
        if (unfinished.length > 0) kv.unpin(unfinished.shift()!);
    }
    kv.check();
  }
  for (const name of names) kv.release(name);
  for (const step of unfinished) kv.unpin(step);
  assertEquals([kv.free, kv.leaving], [20, 0]);
});
