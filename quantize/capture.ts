/**
 * What a block is fitted to: the float layer runs over the calibration text; its outputs are what to
 * aim for, the products of its matrices' inputs (`X'X`) say which errors of the weights count.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";
import { LINEAR_NAMES, linearShape } from "../shared/model_config.ts";
import type { HessianBand } from "./gpu/coded_matrix.ts";
import { type Block, BLOCK_INPUTS, type BlockInput, createForward } from "./gpu/forward.ts";
import { matmul } from "./gpu/matmul.ts";
import type { Operation, Recorder } from "./gpu/operation.ts";
import { rowwise } from "./gpu/rows.ts";
import type { BlockTask } from "./quantize_block.ts";
import { type Stage, withStage } from "./stage.ts";

/** Of the mean of a band's diagonal, added to it: directions that the text does not show. */
const DAMPING = 0.01;

/**
 * Runs the float layer over both inputs: over the float model's it makes the float outputs, over the
 * quantized model's the Hessians.
 *
 * @param keeper owns the Hessians
 */
export function capture(
  gpu: Gpu,
  keeper: Recorder,
  task: BlockTask,
): Promise<Record<BlockInput, HessianBand[]>> {
  const { config, shape, layer, inputs, outputs, batches } = task;
  return withStage(gpu, config, shape, createForward, async (stage) => {
    const { recorder, block, words, wordCount, enter, leave } = stage;
    for (const name of LINEAR_NAMES) {
      const { buffer, row } = block.matrices[name];
      await recorder.fill(buffer, layer.matrices[name], row * linearShape(config, name)[1]);
    }
    gpu.write(block.norms.input, 0, layer.norms.input);
    gpu.write(block.norms.post, 0, layer.norms.post);
    const { hessians, accumulate, damp } = await recordHessians(stage, keeper, task);
    for (let batch = 0; batch < batches; batch++) {
      gpu.write(words, 0, await inputs.float.read(batch));
      recorder.run([enter, ...block.forward, leave]);
      await outputs.float.write(batch, await recorder.words(words, wordCount));
      gpu.write(words, 0, await inputs.quantized.read(batch));
      recorder.run([enter, ...block.forward, ...accumulate]);
      await recorder.pace();
    }
    recorder.run(damp);
    await recorder.settle();
    return hessians;
  });
}

async function recordHessians(
  { recorder, block }: Stage<Block>,
  keeper: Recorder,
  { format, maxHessianBytes }: BlockTask,
) {
  const hessians = {} as Record<BlockInput, HessianBand[]>;
  const accumulate: Operation[] = [], damp: Operation[] = [];
  for (const input of BLOCK_INPUTS) {
    const { buffer, columns: k } = block.inputs[input];
    hessians[input] = hessianBands(k, format.g, maxHessianBytes).map(([first, rows]) => ({
      buffer: keeper.buffer(`hessian of ${input}`, rows * k),
      first,
      rows,
    }));
    for (const { buffer: hessian, first, rows } of hessians[input]) {
      accumulate.push(
        ...await matmul(recorder, {
          label: "hessian",
          a: { buffer, stride: k, offset: first },
          transposeA: true,
          b: { buffer, stride: k },
          c: { buffer: hessian, stride: k },
          m: rows,
          n: k,
          k: block.rows,
          add: "c",
        }),
      );
      damp.push(
        await rowwise(recorder, "damp", [hessian], {
          rows,
          columns: k,
          extra: first,
          value: DAMPING,
          workgroups: [1],
        }),
      );
    }
  }
  return { hessians, accumulate, damp };
}

/**
 * Cuts the rows of a Hessian into runs of whole groups that each fit a binding: one run, but for the
 * widest matrices of the largest models (28672 squared are 3.3 GB).
 *
 * @param maxBytes of a binding
 * @returns first row and number of rows of each run
 */
export function hessianBands(
  k: number,
  g: number,
  maxBytes: number,
): [first: number, rows: number][] {
  const most = Math.max(1, Math.floor(maxBytes / 4 / k / g)) * g;
  const bands = Math.ceil(k / most);
  const rows = Math.ceil(k / bands / g) * g;
  return Array.from({ length: Math.ceil(k / rows) }, (_, i) => [
    i * rows,
    Math.min(rows, k - i * rows),
  ]);
}
