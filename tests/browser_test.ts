/** The monitor page in a real headless Chromium, over a real listener. */
import { type Browser, chromium, type Page } from "playwright-core";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import type { FleetSnapshot } from "../coordinator/snapshot.ts";
import { scriptedApi, serveOnLoopback } from "./api_fixture.ts";
import { snapshotFixture } from "./snapshot_fixture.ts";

const executablePath = Deno.env.get("CHROMIUM") ?? "/usr/bin/chromium";
const ignore = !exists(executablePath);
if (ignore) console.warn(`The browser test is skipped: no ${executablePath} (set CHROMIUM)`);

const ARGUMENTS = [
  "--headless=new",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

function exists(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

/** A page that fails the test on any error of its own, refused resources included. */
async function openPage(browser: Browser, url: string, options: object = {}) {
  const page = await browser.newPage(options);
  const faults: string[] = [];
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (message) => {
    if (message.type() === "error") faults.push(message.text());
  });
  await page.goto(url);
  return { page, faults };
}

const isLive = (page: Page) => page.waitForSelector('#link[data-state="live"]');
const waitForText = (page: Page, selector: string, text: string) =>
  page.locator(selector, { hasText: text }).first().waitFor();

/** Elements whose content is wider than they are. */
function tooWide(page: Page): Promise<string[]> {
  return page.evaluate(`[...document.querySelectorAll("html, .card, .stage > *, .node")]
    .filter((each) => each.scrollWidth > each.clientWidth + 1)
    .map((each) => each.className || each.tagName)`);
}

async function shareOf(page: Page, bar: string): Promise<number> {
  const style = await page.locator(`${bar} > i`).first().getAttribute("style");
  return Number(/width: ([\d.]+)%/.exec(style ?? "")?.[1]) / 100;
}

Deno.test({
  name: "the page shows the pipeline live, in a real browser",
  ignore,
  // Playwright keeps timers and pipes of its own until the browser is gone.
  sanitizeResources: false,
  sanitizeOps: false,
}, async (t) => {
  const browser = await chromium.launch({ executablePath, args: ARGUMENTS });
  const { app, engine } = scriptedApi();
  const first = serveOnLoopback(app);
  try {
    engine.picture = snapshotFixture({ stages: 4 });
    const { page, faults } = await openPage(browser, first.url);
    await isLive(page);

    await t.step(
      "each stage stands there with its worker, layers, latencies and bars",
      async () => {
        const stages = page.locator(".stage");
        assertEquals(await stages.count(), 4);
        for (const [index, stage] of engine.picture.plan!.stages.entries()) {
          const text = await stages.nth(index).innerText();
          assertStringIncludes(text, stage.worker);
          assertStringIncludes(text, engine.picture.workers[index].gpu);
          assertStringIncludes(text, `layers ${stage.from}–${stage.to - 1}`);
          assertStringIncludes(text, `${stage.latency!.total.p99.toFixed(1)} ms`);
          assertStringIncludes(text, `${stage.latency!.gpu.p50.toFixed(1)} ms`);
          assertStringIncludes(text, `${stage.predictedMs.toFixed(1)} ms`);
          assertStringIncludes(text, `${engine.picture.workers[index].roundTripMs!.toFixed(2)} ms`);
        }
        const label = await stages.nth(0).locator(".stack").first().getAttribute("aria-label");
        assertStringIncludes(label!, "p50: Wire 0.");
        assertStringIncludes(await page.locator("#spares").innerText(), "Left out: with 3 layers");
        assertStringIncludes(await page.locator("#events").innerText(), "gpu-9 was lost");
        assert(await page.locator(".wires circle").count() > 0, "tokens move");
        for (const width of [1400, 1280, 1000, 820, 600]) {
          await page.setViewportSize({ width, height: 900 });
          assertEquals(await tooWide(page), [], `at ${width} pixels`);
        }
      },
    );

    await t.step("a change moves the bars and the figures without a reload", async () => {
      const next = snapshotFixture({ stages: 4, seed: 2 });
      next.plan!.stages[1].busy = 0.25;
      next.load.tokensPerSecond = 123.4;
      next.load.pagesUsed = 512;
      engine.show(next);
      await waitForText(page, "#load", "123");
      assertEquals(await shareOf(page, ".stage:nth-child(2) .busy"), 0.25);
      assertEquals(await shareOf(page, "#load .bar"), 0.5);
    });

    await t.step("names from the fleet are text, whatever they hold", async () => {
      const evil = '<img src=x onerror="document.title=1">';
      const next: FleetSnapshot = snapshotFixture({ stages: 2 });
      next.plan!.stages[0].worker = next.workers[0].worker = evil;
      next.workers[0].gpu =
        next.note =
        next.model.id =
        next.events[0].text =
          evil;
      engine.show(next);
      await waitForText(page, "#state-note", "<img");
      assertEquals(await page.locator("img").count(), 0);
      assertEquals(await page.locator(".stage h3").first().innerText(), evil);
      assertEquals(await page.title(), "codegemm-fleet");
    });

    await t.step("waiting, loading and failed say so", async () => {
      engine.show(snapshotFixture({ state: "waiting" }));
      await waitForText(page, "#state-note", "Waiting for workers");
      assertEquals(await page.locator(".stage").count(), 0);
      const loading = snapshotFixture({ state: "loading", stages: 2 });
      loading.workers[1].progress = { doneBytes: 3e9, totalBytes: 4e9 };
      engine.show(loading);
      await waitForText(page, ".stage >> nth=1", "75 %");
      assertEquals(await shareOf(page, ".stage:nth-child(2) .loading"), 0.75);
      assertEquals(await page.locator(".wires circle").count(), 0);
      engine.show(snapshotFixture({ state: "failed" }));
      await waitForText(page, "#state", "No plan fits");
    });

    await t.step("a broken link is shown, and mended when the coordinator is back", async () => {
      await first.stop();
      await page.waitForSelector('#link[data-state="reconnecting"]');
      engine.picture = snapshotFixture({ stages: 3, seed: 5 });
      const second = serveOnLoopback(app, first.port);
      await isLive(page);
      assertEquals(await page.locator(".stage").count(), 3);
      await page.close();
      await second.stop();
    });
    // A refused connection is logged by the browser itself.
    assertEquals(faults.filter((fault) => !fault.includes("net::ERR_")), []);
  } finally {
    await browser.close();
  }
});

Deno.test({
  name: "the page asks for a key where one is needed, and fits a phone in both schemes",
  ignore,
  sanitizeResources: false,
  sanitizeOps: false,
}, async () => {
  const browser = await chromium.launch({ executablePath, args: ARGUMENTS });
  const { app } = scriptedApi({ apiKeys: ["the-key"] });
  const served = serveOnLoopback(app);
  try {
    for (const colorScheme of ["light", "dark"]) {
      const viewport = { width: 390, height: 844 };
      const { page } = await openPage(browser, served.url, { viewport, colorScheme });
      await page.locator("#key-input").fill("no-key");
      await page.locator("#key button").click();
      await waitForText(page, "#link", "does not fit");
      await page.locator("#key-input").fill("the-key");
      await page.locator("#key button").click();
      await isLive(page);
      assert(!(await page.locator("#key").isVisible()));
      assertEquals(await tooWide(page), []);
      await page.close();
    }
  } finally {
    await browser.close();
    await served.stop();
  }
});
