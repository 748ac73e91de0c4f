/**
 * The monitor page: follows `/events`, shows each snapshot, comes back by itself.
 *
 * @module
 */
import { createTiles, eventItem, GLOSSARY, h, spareItem } from "./cards.js";
import { eventPayloads } from "./event_stream.js";
import { modelLine } from "./format.js";
import { createPipeline } from "./pipeline.js";

/** The coordinator sends at least every second; a link that is silent for longer is dead. */
const SILENCE_MS = 5_000;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5_000;
const KEY = "codegemm-fleet-api-key";

const at = (id) => document.getElementById(id);
const updateTiles = createTiles(at("load"));
const updatePipeline = createPipeline(at("pipeline"));

for (const [term, meaning] of Object.entries(GLOSSARY)) {
  at("glossary").append(h("div", {}, h("dt", {}, term), h("dd", {}, meaning)));
}

/** Draws a snapshot. */
function show(snapshot) {
  const { model, state, note, plan, workers, events, nowUnixMs } = snapshot;
  at("model").textContent = modelLine(model);
  const banner = at("state");
  banner.hidden = false;
  banner.dataset.state = state;
  say("state-word", state);
  say("state-note", note);
  updateTiles(snapshot);
  updatePipeline(snapshot);
  const placed = new Set((plan?.stages ?? []).map((stage) => stage.worker));
  const spares = workers.filter((each) => !placed.has(each.worker));
  fill("spares", spares.map(spareItem));
  fill("why", (plan?.explanation ?? []).map((sentence) => h("li", {}, sentence)));
  fill("events", events.map((event) => eventItem(event, nowUnixMs)));
}

function say(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

/** Fills the list in a card; a card without entries is hidden. */
function fill(id, items) {
  const card = at(id);
  card.hidden = items.length === 0;
  const list = card.querySelector("ul, ol");
  const scrolled = list.scrollTop;
  list.replaceChildren(...items);
  list.scrollTop = scrolled;
}

function link(state, text) {
  at("link").dataset.state = state;
  say("link", text);
  document.querySelector("main").dataset.stale = String(state !== "live");
}

/**
 * Follows the events until the link breaks.
 *
 * @param {() => void} onLive called with every snapshot
 */
async function follow(onLive) {
  const abort = new AbortController();
  let watchdog = setTimeout(() => abort.abort(), SILENCE_MS);
  const key = sessionStorage.getItem(KEY);
  try {
    const response = await fetch("/events", {
      signal: abort.signal,
      headers: key === null ? {} : { authorization: `Bearer ${key}` },
    });
    if (response.status === 401) return askForKey(key !== null);
    if (!response.ok) throw new Error(`the coordinator answers ${response.status}`);
    for await (const payload of eventPayloads(response.body)) {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), SILENCE_MS);
      show(JSON.parse(payload));
      onLive();
    }
  } finally {
    clearTimeout(watchdog);
  }
}

/** Resolves when a key was entered. */
function askForKey(wasWrong) {
  link("key", wasWrong ? "this key does not fit" : "a key is needed");
  const form = at("key");
  form.hidden = false;
  at("key-input").focus();
  return new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, at("key-input").value);
      at("key-input").value = "";
      form.hidden = true;
      resolve();
    }, { once: true });
  });
}

async function run() {
  let retryMs = FIRST_RETRY_MS;
  while (true) {
    try {
      await follow(() => {
        retryMs = FIRST_RETRY_MS;
        link("live", "live");
      });
    } catch (error) {
      console.warn("The link broke:", error);
    }
    link("reconnecting", "reconnecting");
    await new Promise((resolve) => setTimeout(resolve, retryMs));
    retryMs = Math.min(LAST_RETRY_MS, 2 * retryMs);
  }
}

run();
