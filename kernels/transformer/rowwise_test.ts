import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import type { StepBatch } from "../../shared/frames.ts";
import { gaussian, randomInt, seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import { withGpu } from "../gpu_fixture.ts";
import type { Kernel, StepShape } from "../kernel.ts";
import { rmsNormReference, roundF16, swigluReference } from "./reference.ts";
import {
  createEmbedding,
  createFinalNorm,
  createHiddenExport,
  createHiddenImport,
  createRmsNorm,
  createSwiGlu,
} from "./rowwise.ts";
import { StepBuffers } from "./step_buffers.ts";

const LIMITS = { maxRows: 16, maxSequences: 4, maxOutputs: 8, pages: 8, contextTokens: 256 };

/** Prefill rows of one sequence with the given tokens; each row in `outputs` asks for logits. */
function batchOf(tokens: number[], outputs: number[] = []): StepBatch {
  return {
    sequences: [{ pages: Uint32Array.of(0, 1) }],
    rowSequence: new Uint16Array(tokens.length),
    rowPosition: Uint32Array.from(tokens.keys()),
    rowToken: Uint32Array.from(tokens),
    decodeRows: 0,
    requests: outputs.map((row) => ({ type: "logits", row })),
  };
}

function run(gpu: Gpu, kernel: Kernel, shape: StepShape): void {
  const encoder = gpu.device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  kernel.encode(pass, shape);
  pass.end();
  gpu.device.queue.submit([encoder.finish()]);
}

const normals = (random: () => number, n: number, scale = 1) =>
  Float32Array.from({ length: n }, () => gaussian(random) * scale);

/** Equal but for the last place of float16. */
function assertF16Close(actual: Float16Array, expected: ArrayLike<number>): void {
  for (let i = 0; i < actual.length; i++) {
    const tolerance = Math.max(2 ** -24, Math.abs(expected[i]) * 2 ** -10);
    assertAlmostEquals(actual[i], roundF16(expected[i]), tolerance, `element ${i}`);
  }
}

Deno.test("the embedding finds each token's row, in whichever piece of the table it lies", () =>
  withGpu(async (gpu) => {
    const hidden = 70, vocab = 23, cut = 9;
    const random = seededRandom(1);
    const table = Float16Array.from({ length: vocab * hidden }, () => gaussian(random));
    const inputs = new StepBuffers(gpu, LIMITS, 16);
    const residual = gpu.storage("residual", LIMITS.maxRows * hidden * 4);
    const kernel = await createEmbedding({
      gpu,
      inputs,
      pieces: [
        { buffer: gpu.upload("0", table.subarray(0, cut * hidden)), firstToken: 0, tokens: cut },
        {
          buffer: gpu.upload("1", table.subarray(cut * hidden)),
          firstToken: cut,
          tokens: vocab - cut,
        },
      ],
      hidden,
      residual,
    });
    const tokens = [0, 8, 9, 22, 8, 15];
    run(gpu, kernel, inputs.write(batchOf(tokens)));
    const out = new Float32Array(await gpu.read(residual, tokens.length * hidden * 4));
    const expected = tokens.flatMap((token) => [
      ...table.subarray(token * hidden, (token + 1) * hidden),
    ]);
    assertEquals([...out], expected);
  }));

Deno.test("RMSNorm of all rows and of the gathered output rows agrees with the reference", () =>
  withGpu(async (gpu) => {
    const random = seededRandom(2);
    for (const hidden of [8, 100, 384, 1030, 2048, 4100]) {
      const rows = 5, outputs = [4, 1], epsilon = 1e-5;
      const inputs = new StepBuffers(gpu, LIMITS, 16);
      const values = normals(random, rows * hidden, 3);
      const gains = normals(random, hidden);
      const residual = gpu.upload("residual", values);
      const weight = gpu.upload("weight", gains);
      const normed = gpu.storage("normed", rows * hidden * 2);
      const gathered = gpu.storage("gathered", rows * hidden * 2);
      const options = { gpu, inputs, hidden, epsilon, residual, weight };
      const shape = inputs.write(batchOf([0, 0, 0, 0, 0], outputs));
      run(gpu, await createRmsNorm({ ...options, normed }), shape);
      run(gpu, await createFinalNorm({ ...options, normed: gathered }), shape);
      const expected = Array.from(
        { length: rows },
        (_, r) => rmsNormReference(values.subarray(r * hidden, (r + 1) * hidden), gains, epsilon),
      );
      const all = new Float16Array(await gpu.read(normed, rows * hidden * 2));
      assertF16Close(all, expected.flatMap((row) => [...row]));
      const picked = new Uint16Array(await gpu.read(gathered, outputs.length * hidden * 2));
      const bits = new Uint16Array(all.buffer);
      outputs.forEach((row, i) =>
        assertEquals(
          picked.subarray(i * hidden, (i + 1) * hidden),
          bits.subarray(row * hidden, (row + 1) * hidden),
        )
      );
    }
  }));

Deno.test("SwiGLU agrees with the reference and stays finite at the ends of the range", () =>
  withGpu(async (gpu) => {
    const random = seededRandom(3);
    const rows = 3;
    for (const width of [172, 139]) { // by fours, and one by one
      const gateUp = normals(random, (rows + 1) * 2 * width, 4);
      gateUp.set([1e4, -1e4, 3e4, -120, 0], 0);
      gateUp.set([1e4, 1e4, -3e4, 5, 7], width);
      const inputs = new StepBuffers(gpu, LIMITS, 16);
      const gated = gpu.storage("gated", (rows + 1) * width * 2);
      const kernel = await createSwiGlu({
        gpu,
        inputs,
        width,
        gateUp: gpu.upload("gate up", gateUp),
        gated,
      });
      run(gpu, kernel, inputs.write(batchOf([0, 0, 0])));
      const out = new Float16Array(await gpu.read(gated, (rows + 1) * width * 2));
      const expected = Array.from({ length: rows * width }, (_, i) => {
        const at = Math.floor(i / width) * 2 * width + i % width;
        return swigluReference(gateUp[at], gateUp[at + width]);
      });
      assertF16Close(out.subarray(0, rows * width), expected);
      assertEquals([out[0], out[2]], [65504, -65504]);
      assert(out.subarray(rows * width).every((value) => value === 0), "past the last row");
    }
  }));

Deno.test("rows that were rounded to float16 pass from stage to stage unchanged", () =>
  withGpu(async (gpu) => {
    const random = seededRandom(4);
    const hidden = 33, rows = 3;
    const bits = Uint16Array.from({ length: rows * hidden }, () => {
      const exponent = randomInt(random, 31);
      return randomInt(random, 2) << 15 | exponent << 10 | randomInt(random, 1024);
    });
    const inputs = new StepBuffers(gpu, LIMITS, 16);
    const residual = gpu.storage("residual", rows * hidden * 4);
    const frame = gpu.storage("frame", rows * hidden * 2);
    const options = { gpu, inputs, hidden, residual };
    const shape = inputs.write(batchOf([0, 0, 0]));
    run(gpu, await createHiddenImport({ ...options, frame: gpu.upload("in", bits) }), shape);
    run(gpu, await createHiddenExport({ ...options, frame }), shape);
    assertEquals(new Uint16Array(await gpu.read(frame, rows * hidden * 2)), bits);
    const values = new Float32Array(await gpu.read(residual, rows * hidden * 4));
    assert(values.some((value) => Math.abs(value) > 1000));
  }));
