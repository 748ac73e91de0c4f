import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import type { StepBatch } from "../../shared/frames.ts";
import { gaussian, randomInt, seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import {
  createDecodeAttention,
  createDecodeBatches,
  createDecodeScratch,
  createPrefillAttention,
} from "./attention.ts";
import { tileRows } from "./attention_wgsl.ts";
import { decodeJoinWgsl } from "./decode_join_wgsl.ts";
import { SPLIT_TOKENS } from "./decode_tiling.ts";
import { Dispatch } from "./dispatch.ts";
import type { StepInputs } from "./inputs.ts";
import { type HeadShape, headShape, kvPageBytes } from "./kv_layout.ts";
import { attentionReference, ropeReference, roundF16 } from "./reference.ts";
import { ropeAngles, ropeFrequencies } from "./rope_angles.ts";
import { createRope } from "./rowwise.ts";
import { StepBuffers } from "./step_buffers.ts";

const LIMITS = { maxRows: 40, maxSequences: 4, maxOutputs: 4, pages: 64, contextTokens: 700 };
const ROPE = { theta: 10_000, scaling: null };

/** Queries, keys and values of every position of a few sequences. */
class Rig {
  readonly shape: HeadShape;
  readonly width: number;
  readonly #positions = new Map<string, Float32Array>();

  constructor(heads: number, kvHeads: number, headDim: number, readonly seed: number) {
    this.shape = headShape({ heads, kvHeads, headDim });
    this.width = (heads + 2 * kvHeads) * headDim;
  }

  /** A sequence's q|k|v at one position: the same whenever it is asked for. */
  qkv(sequence: number, position: number): Float32Array {
    const key = `${sequence}/${position}`;
    let row = this.#positions.get(key);
    if (!row) {
      const random = seededRandom(this.seed + sequence * 10_007 + position);
      row = Float32Array.from({ length: this.width }, () => gaussian(random));
      this.#positions.set(key, row);
    }
    return row;
  }

  head(sequence: number, position: number, head: number): Float32Array {
    const { headDim } = this.shape;
    return this.qkv(sequence, position).subarray(head * headDim, (head + 1) * headDim);
  }

  /** What a row attends to, by plain loops. */
  expected(sequence: number, position: number): number[] {
    const { heads, kvHeads, group, headDim } = this.shape;
    const frequencies = ropeFrequencies({ headDim, ...ROPE });
    const out: number[] = [];
    for (let head = 0; head < heads; head++) {
      const kvHead = Math.floor(head / group);
      const keys = [], values = [];
      for (let p = 0; p <= position; p++) {
        const key = ropeReference(this.head(sequence, p, heads + kvHead), p, frequencies);
        keys.push(Array.from(key, roundF16));
        values.push(Array.from(this.head(sequence, p, heads + kvHeads + kvHead), roundF16));
      }
      const query = ropeReference(this.head(sequence, position, head), position, frequencies);
      out.push(...attentionReference(query, keys, values));
    }
    return out;
  }
}

/**
 * The kernels of one attention layer over a cache.
 *
 * @param past what each byte of the cache is before a row is written
 */
async function createLayer(gpu: Gpu, rig: Rig, scratchBytes?: number, past = 0) {
  const { shape } = rig;
  const { headDim, heads } = shape;
  const inputs = new StepBuffers(gpu, LIMITS, tileRows(shape));
  const qkv = gpu.storage("qkv", LIMITS.maxRows * rig.width * 4);
  const keys = gpu.storage("keys", LIMITS.pages * kvPageBytes(shape));
  const values = gpu.storage("values", LIMITS.pages * kvPageBytes(shape));
  const attended = gpu.storage("attended", LIMITS.maxRows * heads * headDim * 2);
  const angles = gpu.upload("angles", ropeAngles({ headDim, ...ROPE }, LIMITS.contextTokens));
  const options = { gpu, inputs: inputs as StepInputs, shape, qkv, keys, values };
  for (const buffer of [keys, values]) gpu.write(buffer, 0, new Uint8Array(buffer.size).fill(past));
  const scratch = createDecodeScratch(gpu, shape, LIMITS, scratchBytes);
  const rope = await createRope({ ...options, angles });
  const decode = await createDecodeAttention({ ...options, attended, scratch });
  const prefill = await createPrefillAttention({ ...options, attended });
  /** float16 bits `(rows, heads * headDim)`. */
  return async (batch: StepBatch): Promise<Uint16Array> => {
    const step = inputs.write(batch);
    for (let row = 0; row < step.rows; row++) {
      const data = rig.qkv(batch.rowSequence[row], batch.rowPosition[row]);
      gpu.write(qkv, row * rig.width * 4, new Float32Array(data));
    }
    const encoder = gpu.device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    rope.encode(pass, step);
    decode.encode(pass, step);
    prefill.encode(pass, step);
    pass.end();
    gpu.device.queue.submit([encoder.finish()]);
    return new Uint16Array(await gpu.read(attended, step.rows * heads * headDim * 2));
  };
}

/** Pages of sequence s, in no order: a shuffle of all pages dealt out evenly. */
function dealPages(sequences: number, seed: number): { pages: Uint32Array }[] {
  const random = seededRandom(seed);
  const all = [...Array(LIMITS.pages).keys()];
  for (let i = all.length - 1; i > 0; i--) {
    const j = randomInt(random, i + 1);
    [all[i], all[j]] = [all[j], all[i]];
  }
  const each = Math.floor(LIMITS.pages / sequences);
  return Array.from({ length: sequences }, (_, s) => ({
    pages: Uint32Array.from(all.slice(s * each, (s + 1) * each)),
  }));
}

/** Rows as [sequence, position]; the first `decodeRows` are decode rows. */
function batchOf(
  sequences: { pages: Uint32Array }[],
  rows: [number, number][],
  decodeRows: number,
): StepBatch {
  return {
    sequences,
    rowSequence: Uint16Array.from(rows, ([sequence]) => sequence),
    rowPosition: Uint32Array.from(rows, ([, position]) => position),
    rowToken: new Uint32Array(rows.length),
    decodeRows,
    requests: [],
  };
}

const span = (sequence: number, from: number, to: number): [number, number][] =>
  Array.from({ length: to - from }, (_, i) => [sequence, from + i]);

function assertClose(actual: Uint16Array, expected: number[], what: string): void {
  const values = new Float16Array(actual.slice().buffer);
  assertEquals(values.length, expected.length);
  for (let i = 0; i < values.length; i++) {
    assertAlmostEquals(values[i], expected[i], 1e-3 + Math.abs(expected[i]) * 1e-3, `${what} ${i}`);
  }
}

const SHAPES: [heads: number, kvHeads: number, headDim: number][] = [
  [2, 2, 8],
  [6, 2, 64],
  [4, 1, 40],
  [3, 3, 10],
  [5, 1, 80],
  [2, 1, 96],
  [12, 1, 128],
  [5, 1, 192],
  [2, 2, 256],
  [6, 1, 252],
  [1, 1, 512],
  [4, 2, 500],
];

for (const [heads, kvHeads, headDim] of SHAPES) {
  const name = `${heads} heads on ${kvHeads} KV heads of ${headDim}`;
  Deno.test(`attention of decode and prefill rows agrees with the reference: ${name}`, () =>
    withGpu(async (gpu) => {
      const rig = new Rig(heads, kvHeads, headDim, 99);
      const run = await createLayer(gpu, rig);
      const sequences = dealPages(2, 5);
      const first = await run(batchOf(sequences, [...span(0, 0, 35), ...span(1, 0, 3)], 0));
      const mixed: [number, number][] = [[0, 35], [0, 36], [1, 3], ...span(1, 4, 25)];
      const second = await run(batchOf(sequences, mixed, 3));
      const width = heads * headDim;
      const row = (bits: Uint16Array, r: number) => bits.subarray(r * width, (r + 1) * width);
      assertClose(row(first, 0), rig.expected(0, 0), "prefill 0/0");
      assertClose(row(first, 34), rig.expected(0, 34), "prefill 0/34");
      assertClose(row(first, 37), rig.expected(1, 2), "prefill 1/2");
      assertClose(row(second, 1), rig.expected(0, 36), "decode 0/36");
      assertClose(row(second, 2), rig.expected(1, 3), "decode 1/3");
      assertClose(row(second, 23), rig.expected(1, 24), "prefill 1/24");
      // Both ends of pages, and of splits.
      await run(batchOf(sequences, span(0, 37, 65), 0));
      const ends = [31, 32, 63, 64];
      const third = await run(batchOf(sequences, ends.map((at) => [0, at]), ends.length));
      for (const [r, at] of ends.entries()) {
        assertClose(row(third, r), rig.expected(0, at), `decode 0/${at}`);
      }
    }));
}

Deno.test("attention over several splits agrees with the reference, with any scratch", () =>
  withGpu(async (gpu) => {
    const rig = new Rig(4, 2, 16, 7);
    const sequences = dealPages(2, 8);
    const last = 600;
    const decodes: Uint16Array[] = [];
    for (const scratchBytes of [0, undefined]) { // 0: one decode row at a time
      const run = await createLayer(gpu, rig, scratchBytes);
      let prefilled = new Uint16Array();
      for (let at = 0; at < last; at += 40) {
        prefilled = new Uint16Array(await run(batchOf(sequences, span(0, at, at + 40), 0)));
      }
      assertClose(prefilled.subarray(39 * 64), rig.expected(0, last - 1), "prefill");
      const long = await run(batchOf(sequences, [[0, last], [1, 0], [0, last + 1]], 3));
      // Of shorter contexts, more rows share a batch.
      const short = Array.from({ length: 18 }, (_, i): [number, number] => [0, 120 - 7 * i]);
      decodes.push(Uint16Array.of(...long, ...await run(batchOf(sequences, short, 18))));
    }
    assertClose(decodes[0].subarray(0, 64), rig.expected(0, last), "decode");
    assertClose(decodes[0].subarray(64, 128), rig.expected(1, 0), "decode of a first position");
    assertClose(decodes[0].subarray(-64), rig.expected(0, 1), "decode of a short context");
    assertEquals(decodes[1], decodes[0]);
  }));

Deno.test("decode rows of uneven contexts agree with the reference, and their bits with those alone", () =>
  withGpu(async (gpu) => {
    const rig = new Rig(24, 3, 20, 23);
    const width = 24 * 20;
    const sequences = dealPages(4, 6);
    const run = await createLayer(gpu, rig);
    // Room for three rows of the longest context that the limits allow, four of the longest here.
    const inTwo = await createLayer(gpu, rig, 3 * 11 * 24 * 24 * 4);
    const lengths = [201, 64, 333, 130];
    for (const layer of [run, inTwo]) {
      for (const [sequence, length] of lengths.entries()) {
        for (let at = 0; at < length; at += 40) {
          await layer(batchOf(sequences, span(sequence, at, Math.min(at + 40, length)), 0));
        }
      }
    }
    // The last positions once more, and some around the end of a first page.
    const rows = lengths.flatMap((length, s): [number, number][] => [[s, length - 1], [s, 31 + s]]);
    const together = await run(batchOf(sequences, rows, rows.length));
    assertEquals(await inTwo(batchOf(sequences, rows, rows.length)), together);
    for (const [r, [sequence, position]] of rows.entries()) {
      const bits = together.subarray(r * width, (r + 1) * width);
      assertClose(bits, rig.expected(sequence, position), `${sequence}/${position}`);
      assertEquals(await run(batchOf(sequences, [[sequence, position]], 1)), bits);
    }
  }));

Deno.test("every decode row of a step is in one batch, none beside", () =>
  withGpu(async (gpu) => {
    const rig = new Rig(4, 2, 16, 7);
    const inputs = new StepBuffers(gpu, LIMITS, tileRows(rig.shape));
    const buffer = gpu.storage("rows, pages and results", 1024);
    const scratch = createDecodeScratch(gpu, rig.shape, LIMITS, 3 * 11 * 4 * 20 * 4);
    const batches = await createDecodeBatches({
      ...{ gpu, inputs, shape: rig.shape, scratch },
      ...{ qkv: buffer, keys: buffer, values: buffer, attended: buffer },
    });
    const dispatched: number[][] = [];
    const pass = {
      setPipeline() {},
      setBindGroup() {},
      dispatchWorkgroups: (...counts: number[]) => void dispatched.push(counts),
    } as unknown as GPUComputePassEncoder;
    const rowsOf = (decodeRows: number, contextTokens: number) => {
      dispatched.length = 0;
      const step = { decodeRows, rows: decodeRows + 3, outputs: 0, contextTokens };
      for (const { split, join } of batches) [split, join].forEach((k) => k.encode(pass, step));
      const [splits, joins] = [0, 1].map((half) => dispatched.filter((_, i) => i % 2 === half));
      assertEquals(splits.map(([, , rows]) => rows), joins.map(([, rows]) => rows));
      return joins.map(([, rows]) => rows);
    };
    assertEquals(rowsOf(0, 700), []);
    assertEquals(rowsOf(2, 700), [2]);
    assertEquals(rowsOf(7, 700), [3, 3, 1]);
    assertEquals(rowsOf(7, 320), [6, 1]);
    assertEquals(rowsOf(40, 64), [33, 7]);
    assertEquals(rowsOf(40, 700).reduce((sum, rows) => sum + rows), 40);
  }));

Deno.test("what a page holds past a decode row's position changes none of its bits", () =>
  withGpu(async (gpu) => {
    const rig = new Rig(8, 2, 40, 17); // parts of the dimensions reach past the last one
    const bits: Uint16Array[] = [];
    for (const past of [0, 0xff]) { // 0xffff is not a number
      const run = await createLayer(gpu, rig, undefined, past);
      const sequences = dealPages(2, 3);
      bits.push(await run(batchOf(sequences, [[0, 0], [1, 0]], 2)));
      for (let at = 1; at < 72; at += 36) {
        bits.push(await run(batchOf(sequences, span(0, at, at + 36), 36)));
      }
    }
    assertEquals(bits.slice(3), bits.slice(0, 3));
    assertClose(bits[5].subarray(35 * 320), rig.expected(0, 72), "decode");
  }));

Deno.test("splits are joined whatever their number, past which anything may lie", () =>
  withGpu(async (gpu) => {
    const shape = headShape({ heads: 3, kvHeads: 1, headDim: 24 }), splits = 150;
    const counts = [1, 2, 9, 32, 33, 97, 150];
    const random = seededRandom(71);
    const partials = new Float32Array(counts.length * shape.heads * splits * 28).fill(NaN);
    const expected: number[] = [];
    for (const [row, count] of counts.entries()) {
      for (let head = 0; head < shape.heads; head++) {
        let sum = 0;
        const weighted = new Array(24).fill(0);
        for (let split = 0; split < count; split++) {
          const at = ((split * counts.length + row) * shape.heads + head) * 28;
          const maximum = 3 * gaussian(random), weight = 1 + 60 * random();
          partials.set([maximum, weight, 0, 0], at);
          sum += Math.exp(Math.fround(maximum)) * weight;
          for (let dim = 0; dim < 24; dim++) {
            const value = partials[at + 4 + dim] = weight * gaussian(random);
            weighted[dim] += Math.exp(Math.fround(maximum)) * value;
          }
        }
        expected.push(...weighted.map((value) => value / sum));
      }
    }
    const rows = Uint32Array.from(counts.flatMap((count) => [0, count * SPLIT_TOKENS - 1, 0, 0]));
    const attended = gpu.storage("attended", expected.length * 2);
    const join = await Dispatch.create({
      gpu,
      label: "join",
      code: decodeJoinWgsl(shape, "first"),
      buffers: [gpu.upload("rows", rows), gpu.upload("partials", partials), attended],
      workgroups: () => [shape.heads, counts.length],
    });
    const encoder = gpu.device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    join.encode(pass, { decodeRows: 0, rows: 0, outputs: 0, contextTokens: 0 });
    pass.end();
    gpu.device.queue.submit([encoder.finish()]);
    assertClose(new Uint16Array(await gpu.read(attended, expected.length * 2)), expected, "joined");
  }));

Deno.test("a row's bits do not depend on chunking, batch mates or pages", () =>
  withGpu(async (gpu) => {
    const rig = new Rig(6, 2, 40, 31);
    const width = 6 * 40;
    const run = await createLayer(gpu, rig);

    /** Prefills 90 positions of sequence 0 in chunks, beside `mates` rows of sequence 1; then decodes two. */
    const stream = async (chunk: number, mates: number, pages: number) => {
      const sequences = dealPages(3, pages);
      const bits: Uint16Array[] = [];
      for (let at = 0; at < 90; at += chunk) {
        const rows = span(0, at, Math.min(90, at + chunk));
        const out = await run(batchOf(sequences, [...span(1, 0, mates), ...rows], 0));
        bits.push(out.slice(mates * width));
      }
      const decode: [number, number][] = mates > 0 ? [[1, mates], [0, 90], [0, 91]] : [[0, 90]];
      const out = await run(batchOf(sequences, [...decode, ...span(2, 0, mates)], decode.length));
      bits.push(out.slice((mates > 0 ? 1 : 0) * width, (mates > 0 ? 2 : 1) * width));
      return bits.flatMap((chunk) => [...chunk]);
    };
    const alone = await stream(40, 0, 1);
    assertEquals(alone.length, 91 * width);
    assert(new Set(alone).size > 1000);
    assertEquals(await stream(1, 0, 2), alone);
    assertEquals(await stream(7, 2, 3), alone);
    assertEquals(await stream(32, 5, 4), alone);
  }));
