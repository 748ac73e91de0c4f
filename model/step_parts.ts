/**
 * Where a step is cut into submissions, so that the GPU does not wait for the CPU that feeds it.
 *
 * Two costs of a submission grow with what is in it (wgpu keeps account of every buffer and bind
 * group): handing it over, during which an idle GPU waits, and dropping that account once it is done,
 * which whoever waits for the GPU does before it learns so. So a step begins with a single layer, and
 * all that follows is handed over while earlier parts run, each as much longer as they allow; and it
 * ends with a few layers, so that all before them can be dropped while those run. Cuts change no bit:
 * passes run in order, and what they work on stays in the same buffers.
 *
 * @module
 */

/** Layers of the first part. */
const HEAD_LAYERS = 1;
/**
 * A part has as many times the layers of the one before it, and is there before that one ends: a layer
 * takes a GPU more than five times as long as handing it over takes the CPU (one row of a 70B model:
 * 140 us to some 20). Only where steps are not encoded ahead it may have to wait.
 */
const GROWTH = 4;
/** The most of a part: nothing is gained beyond, and what is dropped at once grows too. */
const MOST_LAYERS = 16;
/** Layers of the last part, which has the outputs beside. */
const TAIL_LAYERS = 2;
/** Shorter stages run all their layers first, and their outputs last. */
const SHORTEST = 12;

/** Layers `[from, to)`, counted from the stage's first one. */
export interface LayerRun {
  from: number;
  to: number;
}

/** The parts of a step through `layers` layers, in order, two at least; the outputs follow the last. */
export function stepParts(layers: number): LayerRun[] {
  const tail = layers < SHORTEST ? layers : layers - TAIL_LAYERS;
  const parts: LayerRun[] = [];
  let size = layers < SHORTEST ? layers : HEAD_LAYERS;
  for (let from = 0; from < tail; size = Math.min(MOST_LAYERS, size * GROWTH)) {
    const to = Math.min(tail, from + size);
    parts.push({ from, to });
    from = to;
  }
  return [...parts, { from: tail, to: layers }];
}
