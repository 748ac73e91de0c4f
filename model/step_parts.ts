/**
 * Where a step is cut into submissions, so that the GPU does not wait for the CPU that feeds it.
 *
 * Two costs of a submission grow with what is in it (wgpu keeps account of every buffer and bind
 * group): handing it over, during which an idle GPU waits, and dropping that account once it is done,
 * which whoever waits for the GPU does before it learns so. So a step begins with a few layers, and
 * all that follows is handed over while they run; and it ends with a few, so that all before them can
 * be dropped while those run. Cuts change no bit: passes run in order, and what they work on
 * stays in the same buffers.
 *
 * @module
 */

/** Layers of the first part. */
const HEAD_LAYERS = 2;
/** The most of a part: less CPU time than the first part takes the GPU. */
const MOST_LAYERS = 16;
/** Layers of the last part, which has the outputs beside. */
const TAIL_LAYERS = 4;
/** Shorter stages run all their layers first, and their outputs last. */
const SHORTEST = 2 * (HEAD_LAYERS + TAIL_LAYERS);

/** Layers `[from, to)`, counted from the stage's first one. */
export interface LayerRun {
  from: number;
  to: number;
}

/** The parts of a step through `layers` layers, in order, two at least; the outputs follow the last. */
export function stepParts(layers: number): LayerRun[] {
  const tail = layers < SHORTEST ? layers : layers - TAIL_LAYERS;
  const parts: LayerRun[] = [];
  let to = layers < SHORTEST ? layers : HEAD_LAYERS;
  for (let from = 0; from < tail; from = to, to = Math.min(tail, from + MOST_LAYERS)) {
    parts.push({ from, to });
  }
  return [...parts, { from: tail, to: layers }];
}
