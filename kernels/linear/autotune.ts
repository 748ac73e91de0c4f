/**
 * Chooses kernel shapes by trying them on the GPU at hand, with the matrices that it will run: among
 * candidates whose results equal the default's bit by bit there, the fastest.
 *
 * @module
 */
import type { NumericsProfile } from "../../shared/protocol.ts";
import { gaussian, seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import type { StepShape } from "../kernel.ts";
import { PassTimer } from "../pass_timer.ts";
import { isVectorOutput } from "./binding.ts";
import { decodeProgram } from "./decode.ts";
import { TrialBuffers, trialLayout } from "./trial.ts";
import type { Linear, Matrix } from "./types.ts";
import type { DecodeChoice, Variant } from "./variant.ts";
import { decodeFamily, defaultVariant, familyBatches } from "./variant.ts";
import type { Batch } from "./wgsl.ts";

/** What is tried beside the default, for each batch by itself. */
export const CANDIDATES: readonly DecodeChoice[] = [
  { prefetch: true },
  { prefetch: false },
  { turnK: 32 },
  { turnK: 64 },
  { turnK: 128 },
  { codeRowsPerThread: 4 },
  { codeRowsPerThread: 8 },
  { codeThreads: 256 },
  { codeThreads: 512 },
];

/** What a choice must gain over the default, so that noise changes nothing. */
const WORTHWHILE = 0.98;
/** Copies of a matrix that are timed in turn, so that no cache holds them. */
const MOST_MATRICES = 16;
/** Compiling lets a GPU fall to lower clocks; it takes this long to be back. */
const BUSY_MS = 100;

/** What was tried, and what came of it. */
export interface Trial {
  choice: DecodeChoice;
  /** Microseconds by batch; a batch that failed or whose bits differ is left out. */
  microseconds: ReadonlyMap<Batch, number>;
}

/** The choice for one shape. */
export interface Tuned {
  variant: Partial<Pick<Variant, "batches" | "byBatch">>;
  trials: Trial[];
}

/**
 * Tunes the decode kernels of CodeGEMM matrices of one shape and format.
 *
 * @param matrices all of one shape; of other layers, so that weights come from memory
 * @returns the default (an empty variant) without timestamps, or where nothing is clearly faster
 */
export async function tuneLinear(
  gpu: Gpu,
  matrices: readonly Matrix[],
  decode: NumericsProfile["decode"],
  candidates: readonly DecodeChoice[] = CANDIDATES,
): Promise<Tuned> {
  const [{ format }] = matrices;
  if (!gpu.timestamps || format === null) return { variant: {}, trials: [] };
  const family = decodeFamily(matrices[0], { decode });
  const batches = familyBatches(defaultVariant(gpu.info.software), family);
  const some = matrices.slice(0, MOST_MATRICES);
  const bench = await gpu.allocate(
    "tuning",
    () => new TuningBench(gpu, some, decode, batches),
  );
  try {
    const standard = await bench.run({});
    const trials = [trialOf({}, standard, standard)];
    for (const choice of candidates) {
      const tried = await bench.run(choice).catch(() => null);
      trials.push(trialOf(choice, standard, tried ?? new Map()));
    }
    gpu.check();
    return { variant: { ...likeOne(standard, matrices[0].n), ...fastest(trials) }, trials };
  } finally {
    bench.destroy();
  }
}

/** Of what ran, the batches with the default's bits. */
function trialOf(choice: DecodeChoice, standard: Runs, tried: Runs): Trial {
  const microseconds = new Map<Batch, number>();
  for (const [batch, run] of tried) {
    const expected = standard.get(batch)!.bits;
    if (run.bits.every((word, i) => word === expected[i])) {
      microseconds.set(batch, run.microseconds);
    }
  }
  return { choice, microseconds };
}

/**
 * The batches whose first row has the bits that it has alone: not all, where a compiler rounds
 * one kernel's sums unlike another's.
 *
 * @param standard the bits of each batch's results, `n` words a row
 */
export function likeOne(
  standard: ReadonlyMap<Batch, { bits: Uint32Array }>,
  n: number,
): Partial<Pick<Variant, "batches">> {
  const alone = standard.get(1)?.bits.subarray(0, n);
  if (alone === undefined) return {};
  const alike = [...standard].filter(([, { bits }]) => alone.every((word, i) => word === bits[i]));
  return alike.length === standard.size ? {} : { batches: alike.map(([batch]) => batch) };
}

/** Each batch's fastest choice, where it is not the default. */
function fastest([standard, ...trials]: Trial[]): Tuned["variant"] {
  const byBatch: Partial<Record<Batch, DecodeChoice>> = {};
  for (const [batch, microseconds] of standard.microseconds) {
    let least = microseconds * WORTHWHILE;
    for (const trial of trials) {
      const taken = trial.microseconds.get(batch) ?? Infinity;
      if (taken >= least) continue;
      least = taken;
      byBatch[batch] = trial.choice;
    }
  }
  return Object.keys(byBatch).length === 0 ? {} : { byBatch };
}

/** One batch of rows: its time, and the bits of the first matrix's results. */
type Runs = Map<Batch, { microseconds: number; bits: Uint32Array }>;

/**
 * What a choice holds for: this adapter, all code that trying it runs, and matrices of one shape.
 */
export async function tuningKey(
  gpu: Gpu,
  matrix: Matrix,
  decode: NumericsProfile["decode"],
  candidates: readonly DecodeChoice[] = CANDIDATES,
): Promise<string> {
  const standard = defaultVariant(gpu.info.software);
  const { input, output, store } = trialLayout(matrix);
  const options = { gpu, matrix, profile: { version: 0, decode }, input };
  const whole = { store, vector: isVectorOutput({ output, matrix }) };
  const programs = [{}, ...candidates].map((candidate) =>
    decodeProgram(options, { ...standard, decode: candidate }, whole)
  );
  const bytes = new TextEncoder().encode(JSON.stringify(programs));
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const members = matrix.members.map(({ n }) => n).join("+");
  return `${gpu.info.name}, ${decode}, ${members} x ${matrix.k}, code ${digest.toHex()}`;
}

/** Runs all choices of a shape with the same buffers. */
class TuningBench {
  readonly #gpu: Gpu;
  readonly #matrices: readonly Matrix[];
  readonly #decode: NumericsProfile["decode"];
  readonly #batches: readonly Batch[];
  readonly #timer: PassTimer;
  readonly #buffers: TrialBuffers;

  constructor(
    gpu: Gpu,
    matrices: readonly Matrix[],
    decode: NumericsProfile["decode"],
    batches: readonly Batch[],
  ) {
    const [{ n, k }] = matrices;
    const random = seededRandom(n + k);
    const x = Float16Array.from({ length: Math.max(...batches) * k }, () => gaussian(random));
    this.#gpu = gpu;
    this.#matrices = matrices;
    this.#decode = decode;
    this.#batches = batches;
    this.#timer = new PassTimer(gpu, BUSY_MS);
    this.#buffers = new TrialBuffers(gpu, matrices[0], x);
  }

  /** Runs every batch size. */
  async run(choice: DecodeChoice): Promise<Runs> {
    const linears: Linear[] = [];
    try {
      const how = { label: "tuning", range: "decode", decode: this.#decode } as const;
      for (const matrix of this.#matrices) {
        linears.push(await this.#buffers.bind(matrix, { ...how, variant: { decode: choice } }));
      }
      const runs: Runs = new Map();
      for (const rows of this.#batches) {
        const shape = this.#buffers.setRows("decode", rows);
        const all = (pass: GPUComputePassEncoder) =>
          linears.forEach((linear) => linear.encode(pass, shape, "decode"));
        const microseconds = await this.#timer.median(all) / linears.length;
        runs.set(rows, { microseconds, bits: await this.#results(linears[0], shape) });
      }
      return runs;
    } finally {
      linears.forEach((linear) => linear.destroy());
    }
  }

  destroy(): void {
    this.#timer.destroy();
    this.#buffers.destroy();
  }

  async #results(linear: Linear, shape: StepShape): Promise<Uint32Array> {
    const encoder = this.#gpu.device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    linear.encode(pass, shape, "decode");
    pass.end();
    this.#gpu.device.queue.submit([encoder.finish()]);
    const bytes = shape.rows * this.#matrices[0].n * 4;
    return new Uint32Array(await this.#gpu.read(this.#buffers.output, bytes));
  }
}
