/**
 * Numbers as people read them.
 *
 * @module
 */

/**
 * Milliseconds with about three digits; seconds from ten thousand on.
 *
 * @param {number | null | undefined} value
 * @returns {string}
 */
export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10_000) return `${(value / 1000).toFixed(1)} s`;
  return `${value.toFixed(value < 1 ? 2 : value < 100 ? 1 : 0)} ms`;
}

/**
 * Bytes in binary units.
 *
 * @param {number} value
 * @returns {string}
 */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at++;
  }
  return `${value.toFixed(at === 0 || value >= 100 ? 0 : 1)} ${units[at]}`;
}

/**
 * A count with separators.
 *
 * @param {number} value
 * @returns {string}
 */
export function count(value) {
  return Math.round(value).toLocaleString("en");
}

/**
 * A count of things, with an s where English wants one.
 *
 * @param {number} value
 * @param {string} word
 * @returns {string}
 */
export function plural(value, word) {
  return `${count(value)} ${word}${value === 1 ? "" : "s"}`;
}

/**
 * A rate with one decimal below a hundred.
 *
 * @param {number} value
 * @returns {string}
 */
export function rate(value) {
  return value < 100 ? value.toFixed(1) : count(value);
}

/**
 * A share of 1 as a percentage.
 *
 * @param {number | null | undefined} value
 * @returns {string}
 */
export function percent(value) {
  return value === null || value === undefined ? "–" : `${Math.round(100 * value)} %`;
}

/**
 * How long ago.
 *
 * @param {number} elapsedMs
 * @returns {string}
 */
export function ago(elapsedMs) {
  const seconds = Math.max(0, Math.round(elapsedMs / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

/**
 * What a stage holds: its layers, counted from 0, and the ends of the model.
 *
 * @param {{ from: number, to: number, first: boolean, last: boolean }} stage
 * @returns {string}
 */
export function layers({ from, to, first, last }) {
  const parts = [];
  if (first) parts.push("embedding");
  if (to - from === 1) parts.push(`layer ${from}`);
  else if (to > from) parts.push(`layers ${from}–${to - 1}`);
  if (last) parts.push("head");
  return parts.join(" · ");
}

/**
 * The model in a line: its name, its layers, its codes and the kernels that multiply them, its size.
 *
 * @param {{ id: string, layers: number, bytes: number, format: string, decode: string | null }} model
 * @returns {string}
 */
export function modelLine(model) {
  const codes = model.decode === null ? model.format : `${model.format}, ${model.decode}`;
  return `${model.id} · ${plural(model.layers, "layer")} · ${codes} · ${bytes(model.bytes)}`;
}

/**
 * Frames and messages that were not taken, by the coordinator or by a worker.
 *
 * @param {{ dropped: Record<string, number>, workers: { dropped: Record<string, number> }[] }} snapshot
 * @returns {number}
 */
export function droppedFrames({ dropped, workers }) {
  return [{ dropped }, ...workers]
    .flatMap((each) => Object.values(each.dropped))
    .reduce((sum, frames) => sum + frames, 0);
}
