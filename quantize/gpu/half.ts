/**
 * Recording the kernels of `half.wgsl`.
 *
 * @module
 */
import CODE from "./half.wgsl" with { type: "text" };
import { lineWorkgroups, type Operation, type Recorder } from "./operation.ts";

/** `count` floats to float16 (`pack`, saturating) or back; `count` is even. */
export function half(
  recorder: Recorder,
  entryPoint: "pack" | "unpack",
  floats: GPUBuffer,
  halves: GPUBuffer,
  count: number,
): Promise<Operation> {
  return recorder.dispatch({
    label: `${entryPoint} float16`,
    code: CODE,
    entryPoint,
    constants: [count / 2, 0, 0, 0],
    buffers: [floats, halves],
    workgroups: lineWorkgroups(count / 2),
  });
}
