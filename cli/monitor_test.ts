import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { scriptedApi, serveOnLoopback } from "../tests/api_fixture.ts";
import { snapshotFixture } from "../tests/snapshot_fixture.ts";
import { followFleet } from "./monitor.ts";
import { monitorView } from "./monitor_view.ts";

const wide = { columns: 200, rows: 60, color: false };

Deno.test("the table has a line per stage with its worker, layers, latencies and memory", () => {
  const snapshot = snapshotFixture({ stages: 3 });
  const lines = monitorView(snapshot, wide).split("\n");
  const heading = lines.findIndex((line) => line.startsWith("stage"));
  for (const [index, stage] of snapshot.plan!.stages.entries()) {
    const line = lines[heading + 1 + index];
    assert(line.startsWith(`${index} `));
    assertStringIncludes(line, stage.worker);
    assertStringIncludes(line, `layers ${stage.from}–${stage.to - 1}`);
    assertStringIncludes(line, `${stage.latency!.gpu.p50.toFixed(1)} ms`);
    assertStringIncludes(line, "22.0 GiB");
    // Figures stand under their headings.
    assertEquals(line.length, lines[heading].length);
  }
  const text = lines.join("\n");
  assertStringIncludes(text, "Left out: with 3 layers");
  assertStringIncludes(text, "gpu-9 was lost");
});

Deno.test("every state can be drawn, in any terminal, within its size", () => {
  for (const state of ["waiting", "loading", "serving", "failed"] as const) {
    for (const [columns, rows] of [[20, 5], [80, 24], [200, 60]]) {
      const text = monitorView(snapshotFixture({ state }), { columns, rows, color: false });
      const lines = text.split("\n");
      assert(lines.length <= rows);
      assert(lines.every((line) => [...line].length <= columns), text);
      assertStringIncludes(text, state);
    }
  }
});

Deno.test("frames that were dropped are counted, the coordinator's and every worker's", () => {
  const snapshot = snapshotFixture({ stages: 2 });
  snapshot.dropped = { "old-epoch": 1 };
  snapshot.workers.forEach((worker, i) => worker.dropped = i === 0 ? { duplicate: 3, gap: 2 } : {});
  assertStringIncludes(monitorView(snapshot, wide), "6 frames dropped");
});

Deno.test("a loading stage shows how far it is", () => {
  const snapshot = snapshotFixture({ state: "loading", stages: 2 });
  snapshot.workers[0].progress = { doneBytes: 1, totalBytes: 4 };
  assertStringIncludes(monitorView(snapshot, wide), "loads 25 %");
});

Deno.test("names from the fleet cannot steer the terminal", () => {
  const snapshot = snapshotFixture({ stages: 1 });
  snapshot.plan!.stages[0].worker = snapshot.workers[0].worker = "gpu\x1b[2J\x07\n";
  snapshot.note = "\x1b]0;title\x07";
  assert(!/\p{Cc}/u.test(monitorView(snapshot, wide).replaceAll("\n", "")));
});

Deno.test("the monitor follows a fleet over a real listener", async () => {
  const { app, engine } = scriptedApi();
  const served = serveOnLoopback(app);
  const stop = new AbortController();
  const states: string[] = [];
  try {
    for await (const snapshot of followFleet({ url: served.url, key: null }, stop.signal)) {
      states.push(snapshot.state);
      if (states.length === 2) break;
      engine.show(snapshotFixture({ state: "failed" }));
    }
    assertEquals(states, ["serving", "failed"]);
  } finally {
    stop.abort();
    await served.stop();
  }
});
