/**
 * The pipeline as a picture: the stages laid out as a snake, wires between them, dots that move.
 *
 * @module
 */
import { createNode, createStage, h, svg } from "./cards.js";
import { count, plural } from "./format.js";

/** Dots move this many pixels a second. */
const SPEED = 210;
const MAX_DOTS = 16;
/** Height, from a card's top, at which wires between neighbours run. */
const WIRE_Y = 32;
const CORNER = 12;
/** What a stage's card needs at least, pixels. */
const CARD_WIDTH = 264;

/**
 * Draws into `container`; the result draws a snapshot.
 *
 * @param {HTMLElement} container
 */
export function createPipeline(container) {
  const wires = svg("svg", { class: "wires", "aria-hidden": "true" });
  const clients = createNode("Clients");
  const coordinator = createNode("Coordinator");
  const stages = h("div", { class: "stages" });
  const empty = h("div", { class: "card empty" });
  container.append(wires, clients.element, coordinator.element, stages);
  /** @type {ReturnType<typeof createStage>[]} */
  let cards = [];
  let dots = 0;
  let drawn = "";

  const draw = () => {
    placeAsSnake(stages, cards.map((card) => card.element));
    const places = placesOf(container, [
      clients.element,
      coordinator.element,
      ...cards.map((card) => card.element),
    ]);
    const paths = wirePaths(places, isNarrow(coordinator.element, stages));
    const key = `${dots} ${Object.values(paths).join(" ")}`;
    if (key === drawn) return;
    drawn = key;
    wires.replaceChildren(
      svg("path", { d: paths.ends }),
      svg("path", { d: paths.forward }),
      svg("path", { d: paths.back, class: "back" }),
      ...movingDots(paths, dots),
    );
  };
  new ResizeObserver(draw).observe(container);

  return function update(snapshot) {
    const { plan, load, workers, model } = snapshot;
    const planned = plan?.stages ?? [];
    clients.set(`${count(load.running)} running`, `${count(load.waiting)} waiting`);
    coordinator.set(
      plan ? `epoch ${plan.epoch}` : "no plan",
      plan ? `attempt ${plan.attempt}` : "",
      plan ? `${plural(load.stepsInFlight, "step")} in flight` : "",
    );
    if (cards.length !== planned.length) {
      cards = planned.map(createStage);
      stages.replaceChildren(...cards.map((card) => card.element));
    }
    if (planned.length === 0) {
      empty.textContent = snapshot.state === "failed"
        ? "No pipeline serves."
        : "The stages appear here when there is a plan.";
      stages.replaceChildren(empty);
      stages.style.gridTemplateColumns = "";
    }
    const scaleMs = Math.max(
      0.001,
      ...planned.map((stage) => Math.max(longestMs(stage.latency), stage.predictedMs)),
    );
    planned.forEach((stage, at) =>
      cards[at].update(stage, workers.find((each) => each.worker === stage.worker), {
        allLayers: model.layers,
        scaleMs,
      })
    );
    dots = load.tokensPerSecond > 0 && !matchMedia("(prefers-reduced-motion: reduce)").matches
      ? Math.min(MAX_DOTS, Math.max(1, load.running))
      : 0;
    draw();
  };
}

/** The longest stacked bar of a stage, ms: percentiles of parts add up to more than the total's. */
function longestMs(latency) {
  if (latency === null) return 0;
  return latency.wire.p99 + latency.queue.p99 + latency.gpu.p99 + latency.readback.p99;
}

/**
 * As many columns as fit, rows of like length, every other row backwards: each stage stands beside or
 * above the one that follows.
 */
function placeAsSnake(stages, elements) {
  if (elements.length === 0) return;
  const gap = parseFloat(getComputedStyle(stages).columnGap);
  const fitting = Math.max(1, Math.floor((stages.clientWidth + gap) / (CARD_WIDTH + gap)));
  const columns = Math.ceil(elements.length / Math.ceil(elements.length / fitting));
  stages.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  elements.forEach((element, at) => {
    const row = Math.floor(at / columns);
    const column = row % 2 ? columns - 1 - at % columns : at % columns;
    element.style.gridRow = String(row + 1);
    element.style.gridColumn = String(column + 1);
  });
}

function placesOf(container, elements) {
  const origin = container.getBoundingClientRect();
  const places = elements.map((element) => {
    const { left, right, top, bottom } = element.getBoundingClientRect();
    return {
      left: Math.round(left - origin.left),
      right: Math.round(right - origin.left),
      top: Math.round(top - origin.top),
      bottom: Math.round(bottom - origin.top),
    };
  });
  return { places, width: Math.round(origin.width), height: Math.round(origin.height) };
}

/** Whether the two ends stand above the stages, not beside them. */
function isNarrow(coordinator, stages) {
  return stages.getBoundingClientRect().top >= coordinator.getBoundingClientRect().bottom;
}

const middle = ({ left, right }) => Math.round((left + right) / 2);

/** The wires as SVG paths: clients to coordinator, coordinator through all stages, and back. */
function wirePaths({ places: [client, coordinator, ...stages], width, height }, narrow) {
  const y = client.top + WIRE_Y;
  const ends = `M${client.right},${y}L${coordinator.left},${y}`;
  if (stages.length === 0) return { ends, forward: "M0,0", back: "M0,0" };
  const points = [];
  let before = coordinator;
  stages.forEach((stage, at) => {
    const below = stage.top >= before.bottom;
    if (below) {
      const turn = Math.round((before.bottom + stage.top) / 2);
      points.push([middle(before), before.bottom], [middle(before), turn]);
      points.push([middle(stage), turn], [middle(stage), stage.top]);
    } else {
      const forwards = stage.left >= before.right;
      const edge = stage.top + WIRE_Y;
      points.push([forwards ? before.right : before.left, edge]);
      points.push([forwards ? stage.left : stage.right, edge]);
    }
    points.push([middle(stage), stage.top + WIRE_Y]);
    if (at === stages.length - 1) points.push([middle(stage), stage.bottom - 4]);
    before = stage;
  });
  const last = stages[stages.length - 1];
  const low = height - 12;
  const back = [[middle(last), last.bottom], [middle(last), low]];
  if (narrow) {
    const far = width - 6, level = coordinator.top + WIRE_Y;
    back.push([far, low], [far, level], [coordinator.right, level]);
  } else {
    back.push([middle(coordinator), low], [middle(coordinator), coordinator.bottom]);
  }
  return { ends, forward: rounded(points), back: rounded(back) };
}

/** A line through `points` with rounded corners. */
function rounded(points) {
  const distinct = points.filter(([x, y], at) =>
    at === 0 || x !== points[at - 1][0] || y !== points[at - 1][1]
  );
  let path = `M${distinct[0].join(",")}`;
  for (let at = 1; at < distinct.length - 1; at++) {
    const corner = distinct[at];
    const into = towards(corner, distinct[at - 1]);
    const out = towards(corner, distinct[at + 1]);
    path += `L${into.join(",")}Q${corner.join(",")} ${out.join(",")}`;
  }
  return `${path}L${distinct[distinct.length - 1].join(",")}`;
}

/** The point on the way from `corner` to `other` where the rounding begins. */
function towards([x, y], [otherX, otherY]) {
  const length = Math.hypot(otherX - x, otherY - y);
  const step = Math.min(CORNER, length / 2) / (length || 1);
  return [Math.round(x + (otherX - x) * step), Math.round(y + (otherY - y) * step)];
}

function movingDots(paths, dots) {
  const there = spread(paths.forward, dots, "dot-there");
  const back = spread(paths.back, dots, "back-dot");
  const tokens = spread(reversed(paths.ends), Math.min(2, dots), "back-dot");
  return [...there, ...back, ...tokens];
}

/** Dots evenly on their way along `path`. */
function spread(path, dots, kind) {
  const seconds = svg("path", { d: path }).getTotalLength() / SPEED;
  if (!(seconds > 0)) return [];
  return Array.from({ length: dots }, (_, at) =>
    svg(
      "circle",
      { r: 4.5, class: kind },
      svg("animateMotion", {
        path,
        dur: `${seconds.toFixed(2)}s`,
        begin: `${(-seconds * at / dots).toFixed(2)}s`,
        repeatCount: "indefinite",
      }),
    ));
}

/** A straight path from its end to its beginning. */
function reversed(path) {
  const [from, to] = path.slice(1).split("L");
  return `M${to}L${from}`;
}
