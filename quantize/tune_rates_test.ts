import { assertAlmostEquals, assertEquals } from "@std/assert";
import { LINEAR_NAMES, type LinearName } from "../shared/model_config.ts";
import type { CodedArrays } from "./gpu/coded_matrix.ts";
import type { LayerArrays } from "./gpu/tuned_layer.ts";
import { layerRates, relativeError } from "./tune_rates.ts";

const FORMAT = { m: 2, v: 2, g: 4, b: 8 };

/** A layer with the same matrix at every place. */
function layer(matrix: CodedArrays | Float32Array<ArrayBuffer>): LayerArrays {
  const norm = Float32Array.of(1);
  return {
    matrices: Object.fromEntries(LINEAR_NAMES.map((name) => [name, matrix])) as Record<
      LinearName,
      typeof matrix
    >,
    norms: { input: norm, post: norm },
  };
}

/** A row of four weights under one scale: 2 * ((1, 0) + (0, 0.5)), 2 * ((1, 0) + (1, 1)). */
function coded(): CodedArrays {
  const codebooks = new Float32Array(2 * 256 * 2);
  codebooks.set([1, 0], 7 * 2);
  codebooks.set([0, 0.5, 1, 1], (256 + 3) * 2);
  return {
    codes: Uint32Array.of(7, 3, 7, 4),
    codebooks,
    scales: Float32Array.of(2),
  };
}

Deno.test("the relative error is that of the weights that codes stand for", () => {
  const exact = Float32Array.of(2, 1, 4, 2);
  assertEquals(relativeError(layer(exact), layer(coded()), FORMAT), 0);
  const off = Float32Array.of(2, 1, 4, 5);
  assertAlmostEquals(relativeError(layer(off), layer(coded()), FORMAT)!, 3 / Math.sqrt(46), 1e-12);
  assertEquals(relativeError(layer(exact), layer(exact), FORMAT), null);
});

Deno.test("rates follow each layer's error; the norms of a kept layer move as the others' do", () => {
  const off = Float32Array.of(2, 1, 4, 5), error = 3 / Math.sqrt(46);
  const rates = { codebooks: 0.5, scales: 0.25, norms: 0.125, codes: 1 };
  const [first, second] = layerRates(
    rates,
    [layer(off), layer(off)],
    [layer(coded()), layer(off)],
    FORMAT,
  );
  assertAlmostEquals(first.codes, error, 1e-12);
  assertAlmostEquals(first.scales, 0.25 * error, 1e-12);
  assertEquals(second, first);
});
