/**
 * Which tile prefills fastest: every candidate on every matrix of a layer, at given numbers of rows.
 * Prefill is bound by arithmetic, so weights are not rotated past the cache.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import {
  holdableTiles,
  layerCodes,
  type Matrix,
  PREFILL_TILES,
  type PrefillTile,
  tileName,
  TrialBuffers,
} from "../kernels/linear/mod.ts";
import type { PassTimer } from "../kernels/pass_timer.ts";
import { type NumericsProfile, PROFILE_VERSION } from "../shared/protocol.ts";

/** The time of one tile on one matrix. */
export interface TileTime {
  matrix: string;
  tile: string;
  rows: number;
  microseconds: number;
  teraflops: number;
}

/**
 * Times the candidates that an adapter can hold, without those that are mostly empty at these rows.
 *
 * @param decode prefill rows are multiplied in integers where decode rows are
 */
export async function timeTiles(
  gpu: Gpu,
  timer: PassTimer,
  matrix: Matrix,
  rows: number,
  decode: NumericsProfile["decode"],
): Promise<TileTime[]> {
  const { n, k } = matrix;
  const x = Float16Array.from({ length: rows * k }, (_, i) => Math.sin(i));
  const buffers = new TrialBuffers(gpu, matrix, x);
  const shape = buffers.setRows("prefill", rows);
  const time = async (tile: PrefillTile) => {
    const linear = await buffers.bind(matrix, {
      label: tileName(tile),
      range: "prefill",
      decode,
      variant: { prefillTiles: [tile] },
    });
    const microseconds = await timer.median((pass) => linear.encode(pass, shape, "prefill"));
    linear.destroy();
    return microseconds;
  };
  const times: TileTime[] = [];
  const useful = PREFILL_TILES.filter((tile) => tile.rows < 2 * rows || tile.rows <= 8);
  const codes = layerCodes({ matrix, profile: { version: PROFILE_VERSION, decode } });
  for (const tile of holdableTiles(gpu, matrix, useful, codes)) {
    const microseconds = await time(tile);
    const teraflops = 2 * n * k * rows / microseconds / 1e6;
    times.push({ matrix: matrix.name, tile: tileName(tile), rows, microseconds, teraflops });
  }
  buffers.destroy();
  return times;
}

/** For each number of rows a line per tile, the fastest layer first, and the best of every matrix. */
export function printTiles(title: string, times: readonly TileTime[]): void {
  const matrices = [...new Set(times.map(({ matrix }) => matrix))];
  for (const [rows, of] of Map.groupBy(times, ({ rows }) => rows)) {
    const cells = matrices.map((name) => name.padStart(10)).join("");
    console.log(`\n${title}, ${rows} rows, us${cells}  layer us  TFLOP/s`);
    const line = (name: string, of: TileTime[]) => {
      const total = of.reduce((sum, { microseconds }) => sum + microseconds, 0);
      const work = of.reduce(
        (sum, { microseconds, teraflops }) => sum + microseconds * teraflops,
        0,
      );
      const columns = matrices.map((matrix) =>
        of.find((time) => time.matrix === matrix)?.microseconds.toFixed(1) ?? "-"
      );
      return {
        total: of.length < matrices.length ? Infinity : total,
        text: name.padEnd(`${title}, ${rows} rows, us`.length) +
          columns.map((text) => text.padStart(10)).join("") + total.toFixed(0).padStart(10) +
          (work / total).toFixed(1).padStart(9),
      };
    };
    const lines = [...Map.groupBy(of, ({ tile }) => tile)].map(([tile, times]) =>
      line(tile, times)
    );
    for (const { text } of lines.toSorted((a, b) => a.total - b.total)) console.log(text);
    const best = matrices.map((matrix) =>
      of.filter((time) => time.matrix === matrix)
        .reduce((a, b) => b.microseconds < a.microseconds ? b : a)
    );
    console.log(line("best of each", best).text);
    for (const { matrix, tile, teraflops } of best) {
      console.log(`  ${matrix.padEnd(10)}${tile.padEnd(24)}${teraflops.toFixed(1)} TFLOP/s`);
    }
  }
}
