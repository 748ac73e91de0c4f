import { assert, assertEquals, assertMatch } from "@std/assert";
import { snapshotFixture } from "../tests/snapshot_fixture.ts";
import { Metrics } from "./metrics.ts";

/** Every sample of a page, by name and labels. */
function samples(page: string): Map<string, number> {
  const lines = page.split("\n").filter((line) => line !== "" && !line.startsWith("#"));
  return new Map(lines.map((line) => {
    const at = line.lastIndexOf(" ");
    return [line.slice(0, at), Number(line.slice(at + 1))];
  }));
}

Deno.test("the page counts what the fleet counts, however often it is asked", async () => {
  const metrics = new Metrics();
  const snapshot = snapshotFixture();
  await metrics.page(snapshot);
  const page = await metrics.page(snapshot);
  assertMatch(page, /# TYPE fleet_tokens_drawn_total counter/);
  const values = samples(page);
  assertEquals(values.get("fleet_tokens_drawn_total"), snapshot.load.tokensTotal);
  assertEquals(values.get("fleet_reissues_total"), snapshot.load.reissuesTotal);
  assertEquals(values.get('fleet_coordinator_dropped_total{reason="duplicate"}'), 3);
  assertEquals(values.get('fleet_state{state="serving"}'), 1);
  assertEquals(values.get('fleet_state{state="failed"}'), 0);
  assertEquals(
    values.get('fleet_stage_latency_ms{stage="1",worker="gpu-1",part="wire",quantile="0.95"}'),
    snapshot.plan!.stages[1].latency!.wire.p95,
  );
  assertEquals(
    values.get('fleet_worker_used_bytes{worker="gpu-0"}'),
    snapshot.workers[0].usedBytes,
  );
});

Deno.test("what left the fleet leaves the page, and no plan is no stage", async () => {
  const metrics = new Metrics();
  await metrics.page(snapshotFixture({ stages: 4 }));
  const page = await metrics.page(snapshotFixture({ state: "waiting" }));
  assert(!page.includes('worker="gpu-'));
  assertEquals(samples(page).get("fleet_plan_epoch"), 0);
});

Deno.test("a worker cannot fill the page with reasons of its own making", async () => {
  const metrics = new Metrics();
  const snapshot = snapshotFixture({ stages: 1, spares: 0 });
  snapshot.workers[0].dropped = Object.fromEntries(
    Array.from({ length: 1000 }, (_, at) => [`reason-${at}`, 1]),
  );
  const dropped = [...samples(await metrics.page(snapshot))].filter(([name]) =>
    name.startsWith("fleet_worker_dropped_frames_total")
  );
  assertEquals(dropped.length, 17);
  assertEquals(dropped.reduce((sum, [, value]) => sum + value, 0), 1000);
});
