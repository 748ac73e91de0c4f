import { assertEquals } from "@std/assert";
import type { StepBatch } from "../../shared/frames.ts";
import { randomInt, seededRandom } from "../../shared/random.ts";
import { Gpu } from "../gpu.ts";
import { StepBuffers } from "./step_buffers.ts";

const LIMITS = { maxRows: 9, maxSequences: 3, maxOutputs: 3, pages: 8, contextTokens: 100 };

function decodeStep(positions: number[], pages: number[]): StepBatch {
  return {
    sequences: positions.map(() => ({ pages: Uint32Array.from(pages) })),
    rowSequence: Uint16Array.from(positions, (_, row) => row),
    rowPosition: Uint32Array.from(positions),
    rowToken: Uint32Array.from(positions, (position) => position * 7),
    decodeRows: positions.length,
    requests: positions.map((_, row) => ({ type: "logits", row })),
  };
}

async function withBuffers(
  test: (gpu: Gpu, make: () => StepBuffers) => Promise<void> | void,
): Promise<void> {
  const gpu = await Gpu.open({ software: true, limits: "default" });
  await test(gpu, () => new StepBuffers(gpu, LIMITS, 4));
  gpu.check();
  gpu.close();
}

Deno.test("a step through buffers that held other steps is the same as through new ones", () =>
  withBuffers(async (gpu, make) => {
    const random = seededRandom(3);
    const used = make();
    for (let i = 0; i < 40; i++) {
      const rows = 1 + randomInt(random, 3);
      const positions = Array.from({ length: rows }, () => randomInt(random, 2));
      const batch = decodeStep(positions, [randomInt(random, 2), 5].slice(randomInt(random, 2)));
      if (randomInt(random, 3) === 0) Object.assign(batch, { decodeRows: 0, requests: [] });
      const fresh = make();
      const shape = used.write(batch);
      assertEquals(shape, fresh.write(batch));
      const { pages } = batch.sequences[0];
      const words = [
        ["rows", 4 * rows],
        ["pageTables", rows * pages.length],
        ["tiles", 4 * shape.prefillTiles],
        ["outputRows", shape.outputs],
      ] as const;
      for (const [name, count] of words) {
        if (count === 0) continue;
        const [got, expected] = await Promise.all(
          [used, fresh].map((buffers) => gpu.read(buffers[name], 4 * count)),
        );
        assertEquals(new Uint32Array(got), new Uint32Array(expected), `${name} of step ${i}`);
      }
      fresh.destroy();
    }
    used.destroy();
  }));

Deno.test("sequences that decode on cost a step one write: of its rows", () =>
  withBuffers((gpu, make) => {
    const buffers = make();
    const { queue } = gpu.device;
    const write = queue.writeBuffer;
    const written: string[] = [];
    queue.writeBuffer = (buffer: GPUBuffer, ...rest: unknown[]) => {
      written.push(buffer.label);
      Reflect.apply(write, queue, [buffer, ...rest]);
    };
    const writesOf = (batch: StepBatch) => {
      written.length = 0;
      buffers.write(batch);
      return written.slice();
    };
    const all = ["step", "step rows", "step page tables", "step output rows"];
    assertEquals(writesOf(decodeStep([5, 3], [1, 2])), all);
    assertEquals(writesOf(decodeStep([6, 4], [1, 2])), ["step rows"]);
    assertEquals(writesOf(decodeStep([7, 5], [1, 3])), ["step rows", "step page tables"]);
    assertEquals(writesOf(decodeStep([7, 5], [1, 3])), []);
    assertEquals(writesOf(decodeStep([8], [1, 3])), ["step", "step rows"]);
    buffers.destroy();
  }));
