import { assertEquals, assertRejects } from "@std/assert";
import { VirtualClock } from "../shared/clock.ts";
import { FleetError } from "../shared/errors.ts";
import { Lease, type LeaseStore } from "./lease.ts";

/** A KV bucket in memory, with the compare-and-set of the real one. */
class MemoryStore implements LeaseStore {
  #entry: { value: Uint8Array; revision: number } | null = null;
  #revision = 0;

  get() {
    return Promise.resolve(this.#entry);
  }

  update(_key: string, value: Uint8Array, revision: number) {
    if ((this.#entry?.revision ?? 0) !== revision) {
      return Promise.reject(new Error("wrong last sequence"));
    }
    this.#entry = { value, revision: ++this.#revision };
    return Promise.resolve(this.#revision);
  }
}

/** Lets promise chains run. */
async function settle() {
  for (let i = 0; i < 20; i++) await Promise.resolve();
}

const unexpected = (error: FleetError) => {
  throw error;
};

Deno.test("a second coordinator is refused while the first renews, and may follow it", async () => {
  const store = new MemoryStore(), clock = new VirtualClock();
  const first = await Lease.acquire(store, clock, "first", unexpected);
  for (let i = 0; i < 10; i++) {
    clock.advance(1_000);
    await settle();
  }
  await assertRejects(
    () => Lease.acquire(store, clock, "second", unexpected),
    FleetError,
    "Another coordinator (first)",
  );
  await first.release();
  const second = await Lease.acquire(store, clock, "second", unexpected);
  await second.release();
});

Deno.test("epochs grow over coordinators, also when one died without releasing", async () => {
  const store = new MemoryStore(), clock = new VirtualClock();
  const first = await Lease.acquire(store, clock, "first", () => {});
  assertEquals(await first.nextEpoch(), 1);
  assertEquals(await first.nextEpoch(), 2);
  // The first one freezes: its timers do not run while ten seconds pass.
  const later = new VirtualClock(clock.unixMs() + 10_000);
  const second = await Lease.acquire(store, later, "second", unexpected);
  assertEquals(await second.nextEpoch(), 3);
});

Deno.test("a coordinator that wakes up after another took over learns that it lost", async () => {
  const store = new MemoryStore(), clock = new VirtualClock();
  const lost: FleetError[] = [];
  const first = await Lease.acquire(store, clock, "first", (error) => lost.push(error));
  const later = new VirtualClock(clock.unixMs() + 10_000);
  await Lease.acquire(store, later, "second", unexpected);
  await assertRejects(() => first.nextEpoch(), FleetError, "holds the lease");
  clock.advance(2_000);
  await settle();
  assertEquals(lost.map((error) => error.code), ["unavailable"]);
});
