/**
 * The pieces of the page: each is made once and updated with every snapshot, so that bars move and
 * nothing flickers. Text from the fleet only ever becomes text.
 *
 * @module
 */
import { ago, bytes, count, droppedFrames, layers, ms, percent, plural, rate } from "./format.js";

/** What each number means: the glossary at the foot of the page, and a tooltip where it is shown. */
export const GLOSSARY = {
  "Tokens per second":
    "Tokens that all sequences together got in the last seconds. The planner's figure beside it is for a full pipeline.",
  "Token latency":
    "Time of one token through all stages and back. The planner predicted the other figure before it loaded anything, for an empty pipeline.",
  "Sequences":
    "A sequence is one stream of tokens of a request. Those that wait have no place or no memory yet.",
  "KV pages":
    "Memory for what the running sequences have read and written so far, in pages of 32 tokens. When they run out, the youngest sequence waits and is replayed later.",
  "Since start": "Tokens drawn and sequences admitted since the coordinator started.",
  "Made good":
    "Reissues: steps sent again because a frame was lost or late. Preemptions: sequences that had to wait for pages. Dropped: frames and messages that came doubled, late or malformed. No token is lost by any.",
  "Stage": "A run of consecutive layers on one worker; the stages in order are the whole model.",
  "Memory": "What the stage takes of the GPU memory the worker offers: weights, pages, scratch.",
  "GPU busy": "Share of the last seconds in which the stage's GPU was computing.",
  "p50, p95, p99":
    "Half of the last steps took at most the first time, 95 of 100 the second, 99 of 100 the third.",
  "Wire": "From the sender's hands to this stage's, through NATS.",
  "Queue": "Waiting until the GPU thread took the step up.",
  "GPU": "The stage's kernels, start to end.",
  "Readback": "From the GPU's memory to the frame that goes on.",
  "Predicted":
    "What the planner expects of one decode step at this stage; the mark on the p50 bar stands there.",
  "Round trip":
    "A control message to the worker and back, median. Frames that it dropped (stale, doubled, malformed) are counted beside it.",
  "Epoch, attempt":
    "Every new plan has a new epoch. The attempt grows when steps are sent again within it.",
  "Moving dots": "One for each running sequence, 16 at most; their speed is not to scale.",
};

const PARTS = /** @type {const} */ (["wire", "queue", "gpu", "readback"]);
const PART_NAMES = { wire: "Wire", queue: "Queue", gpu: "GPU", readback: "Readback" };
const SVG = "http://www.w3.org/2000/svg";
/** Snapshots behind the sparkline: two minutes of an unchanging fleet; it is spread over fewer. */
const HISTORY = 120;
const SPREAD = 30;

/**
 * An element. Strings among the children become text, never markup.
 *
 * @param {string} tag
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/**
 * An SVG element.
 *
 * @param {string} tag
 * @param {Record<string, string | number>} [attributes]
 * @param {...Node} children
 */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** Sets text only where it changed: a selection or a screen reader is not disturbed. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function titled(tag, term, attributes = {}) {
  return h(tag, { ...attributes, title: GLOSSARY[term] });
}

/** A bar of one share; says what it shows to those who cannot see it. */
function bar(kind = "") {
  const fill = h("i");
  const element = h("div", { class: `bar ${kind}`, role: "img" }, fill);
  return {
    element,
    update(share, label, from = 0) {
      fill.style.left = `${100 * from}%`;
      fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
      element.setAttribute("aria-label", label);
    },
  };
}

function line(term, name = term) {
  const value = h("span");
  const element = titled("p", term, { class: "line" });
  element.append(h("span", {}, name), value);
  return { element, set: (text) => say(value, text) };
}

/** The load figures. */
export function createTiles(container) {
  const tile = (term, wide = false) => {
    const name = h("p", { class: "quiet" }, term);
    const value = h("p", { class: "value" }, "–");
    const note = h("p", { class: "quiet" });
    const element = titled("div", term, { class: `card tile${wide ? " wide" : ""}` });
    element.append(name, value, note);
    container.append(element);
    return {
      element,
      set(text, below) {
        say(value, text);
        say(note, below);
      },
    };
  };
  const speed = tile("Tokens per second", true);
  const spark = sparkline();
  speed.element.append(spark.element);
  const latency = tile("Token latency");
  const sequences = tile("Sequences");
  const pages = tile("KV pages");
  const pagesBar = bar();
  pages.element.append(pagesBar.element);
  const since = tile("Since start");
  const good = tile("Made good");
  return function update(snapshot) {
    const { load, plan } = snapshot;
    const predicted = plan
      ? `${rate(plan.predictedTokensPerSecond)} predicted when full`
      : "no plan";
    speed.set(rate(load.tokensPerSecond), predicted);
    spark.push(load.tokensPerSecond);
    latency.set(
      ms(plan?.measuredTokenMs),
      plan ? `${ms(plan.predictedTokenMs)} predicted` : "no plan",
    );
    sequences.set(`${count(load.running)} running`, `${count(load.waiting)} waiting`);
    const share = load.pages > 0 ? load.pagesUsed / load.pages : 0;
    const used = `${count(load.pagesUsed)} of ${count(load.pages)} pages`;
    pages.set(percent(share), used);
    pagesBar.update(share, `KV pages: ${used}`);
    since.set(count(load.tokensTotal), `tokens, ${plural(load.sequencesTotal, "sequence")}`);
    good.set(
      `${count(load.reissuesTotal)} reissues`,
      `${count(load.preemptionsTotal)} preemptions, ${
        plural(droppedFrames(snapshot), "frame")
      } dropped`,
    );
  };
}

function sparkline() {
  const area = svg("path", { class: "spark-area" });
  const stroke = svg("path", { class: "spark-line" });
  const element = svg(
    "svg",
    {
      viewBox: "0 0 100 40",
      preserveAspectRatio: "none",
      role: "img",
    },
    area,
    stroke,
  );
  const values = [];
  return {
    element,
    push(value) {
      values.push(value);
      if (values.length > HISTORY) values.shift();
      const top = Math.max(1, ...values);
      const span = Math.max(SPREAD, values.length) - 1;
      const x = (at) => (100 * (span - values.length + 1 + at) / span).toFixed(2);
      const points = values.map((each, at) => `${x(at)},${(38 - 35 * each / top).toFixed(2)}`);
      stroke.setAttribute("d", `M${points.join("L")}`);
      area.setAttribute("d", `M${x(0)},40L${points.join("L")}L100,40Z`);
      element.setAttribute("aria-label", `Tokens per second lately, at most ${rate(top)}`);
    },
  };
}

/** The two ends of the pipeline that are no stages. */
export function createNode(name) {
  const big = h("p", { class: "big" }, "–");
  const notes = [h("p", { class: "quiet" }), h("p", { class: "quiet" })];
  const element = h("div", { class: "card node" }, h("p", { class: "quiet" }, name), big, ...notes);
  return {
    element,
    set(text, ...below) {
      say(big, text);
      notes.forEach((note, at) => say(note, below[at] ?? ""));
    },
  };
}

/** A stage with its worker. */
export function createStage() {
  const number = titled("span", "Stage", { class: "number" });
  const name = h("h3");
  const gpu = h("p", { class: "quiet" });
  const head = h("div", { class: "head" }, number, h("div", {}, name, gpu));
  const span = line("Stage", "holds");
  const strip = bar();
  const memory = line("Memory", "memory");
  const memoryBar = bar();
  const busy = line("GPU busy", "GPU busy");
  const busyBar = bar("busy");
  const latency = createLatency();
  const progress = createProgress();
  const link = line("Round trip", "round trip");
  const note = h("p", { class: "quiet" });
  const element = h(
    "article",
    { class: "card stage" },
    head,
    h("div", {}, span.element, strip.element),
    h("div", {}, memory.element, memoryBar.element),
    h("div", {}, busy.element, busyBar.element),
    latency.element,
    link.element,
    progress.element,
    note,
  );
  return {
    element,
    update(stage, worker, { allLayers, scaleMs }) {
      element.dataset.state = worker?.state ?? "lost";
      element.setAttribute("aria-label", `Stage ${stage.index} on ${stage.worker}`);
      say(number, String(stage.index));
      say(name, stage.worker);
      say(gpu, worker ? `${worker.gpu}${worker.software ? " (software)" : ""}` : "gone");
      span.set(layers(stage));
      strip.update(
        (stage.to - stage.from) / allLayers,
        `Layers ${stage.from} to ${stage.to - 1} of ${allLayers}`,
        stage.from / allLayers,
      );
      const takes = worker ? `${bytes(worker.usedBytes)} of ${bytes(worker.memoryBytes)}` : "–";
      memory.set(takes);
      memoryBar.update(worker ? worker.usedBytes / worker.memoryBytes : 0, `Memory: ${takes}`);
      busy.set(percent(stage.busy));
      busyBar.update(stage.busy ?? 0, `GPU busy: ${percent(stage.busy)}`);
      latency.update(stage, scaleMs);
      link.set(linkText(worker));
      progress.update(worker?.progress ?? null);
      const quiet = worker === undefined || worker.state === "serving";
      note.hidden = quiet;
      say(note, quiet ? "" : worker.note);
    },
  };
}

function linkText(worker) {
  if (!worker) return "–";
  const dropped = Object.values(worker.dropped).reduce((sum, each) => sum + each, 0);
  return ms(worker.roundTripMs) + (dropped > 0 ? `, ${count(dropped)} dropped` : "");
}

function createProgress() {
  const shown = line("Stage", "weights");
  const loading = bar("loading");
  const element = h("div", { hidden: "" }, shown.element, loading.element);
  return {
    element,
    update(progress) {
      element.hidden = progress === null;
      if (progress === null) return;
      const { doneBytes, totalBytes } = progress;
      const share = totalBytes > 0 ? doneBytes / totalBytes : 0;
      const text = `${percent(share)} of ${bytes(totalBytes)}`;
      shown.set(text);
      loading.update(share, `Weights: ${text}`);
    },
  };
}

/** Where the time of a step goes: a stacked bar per percentile, all stages to one scale. */
function createLatency() {
  const rows = ["p50", "p95", "p99"].map((percentile) => {
    const segments = PARTS.map((part) => h("i", { class: part }));
    const mark = percentile === "p50" ? [titled("b", "Predicted")] : [];
    const stack = h("div", { class: "stack", role: "img" }, ...segments, ...mark);
    const total = h("span", { class: "total" });
    const label = titled("span", "p50, p95, p99", { class: "quiet" });
    label.textContent = percentile;
    return { percentile, segments, mark: mark[0], stack, total, label };
  });
  const grid = h("div", { class: "latency" });
  for (const { label, stack, total } of rows) grid.append(label, stack, total);
  const values = PARTS.map(() => h("b"));
  const legend = h("div", { class: "legend" });
  PARTS.forEach((part, at) => {
    const item = titled("span", PART_NAMES[part]);
    item.append(h("i", { class: part }), h("em", {}, PART_NAMES[part].toLowerCase()), values[at]);
    legend.append(item);
  });
  const predicted = line("Predicted", "predicted");
  const measured = h("div", { class: "measured" }, grid, legend);
  const element = h("div", { class: "measured" }, measured, predicted.element);
  return {
    element,
    update({ latency, predictedMs }, scaleMs) {
      measured.hidden = latency === null;
      predicted.set(ms(predictedMs));
      if (latency === null) return;
      for (const { percentile, segments, mark, stack, total } of rows) {
        PARTS.forEach((part, at) => {
          segments[at].style.width = `${100 * latency[part][percentile] / scaleMs}%`;
        });
        if (mark) mark.style.left = `${100 * Math.min(1, predictedMs / scaleMs)}%`;
        say(total, ms(latency.total[percentile]));
        const split = PARTS.map((part) => `${PART_NAMES[part]} ${ms(latency[part][percentile])}`);
        stack.setAttribute("aria-label", `${percentile}: ${split.join(", ")}`);
      }
      PARTS.forEach((part, at) => say(values[at], ms(latency[part].p50)));
    },
  };
}

/** Workers that hold no stage, and why. */
export function spareItem({ worker, gpu, software, memoryBytes, state, note }) {
  return h(
    "li",
    {},
    h("strong", {}, worker),
    h("span", { class: "tag", "data-state": state }, state),
    h("p", { class: "quiet" }, `${gpu}${software ? " (software)" : ""}, ${bytes(memoryBytes)}`),
    h("p", {}, note),
  );
}

/** Something that happened. */
export function eventItem({ atUnixMs, level, text }, nowUnixMs) {
  const when = h("time", { class: "quiet", datetime: new Date(atUnixMs).toISOString() });
  when.textContent = ago(nowUnixMs - atUnixMs);
  const dot = h("span", { class: "dot", "data-level": level, role: "img", "aria-label": level });
  return h("li", {}, dot, h("span", {}, text), when);
}
