/**
 * A kernel of one dispatch: a pipeline, a bind group, a number of workgroups.
 *
 * @module
 */
import type { Gpu } from "../gpu.ts";
import type { Kernel, StepShape } from "../kernel.ts";

/** Workgroups along x, y and z. A zero means: nothing to do in this step. */
export type Workgroups = readonly [x: number, y?: number, z?: number];

/** What a {@linkcode Dispatch} runs. */
export interface DispatchOptions<S extends StepShape> {
  gpu: Gpu;
  label: string;
  code: string;
  entryPoint?: string;
  constants?: Record<string, number>;
  /** Bindings 0, 1, ... of group 0, bound whole. */
  buffers: GPUBuffer[];
  workgroups: (shape: S) => Workgroups;
}

/** A kernel of one dispatch. */
export class Dispatch<S extends StepShape = StepShape> implements Kernel {
  readonly label: string;
  readonly #pipeline: GPUComputePipeline;
  readonly #bindGroup: GPUBindGroup;
  readonly #workgroups: (shape: S) => Workgroups;

  private constructor(pipeline: GPUComputePipeline, options: DispatchOptions<S>) {
    this.label = options.label;
    this.#pipeline = pipeline;
    this.#bindGroup = options.gpu.device.createBindGroup({
      label: options.label,
      layout: pipeline.getBindGroupLayout(0),
      entries: options.buffers.map((buffer, binding) => ({ binding, resource: { buffer } })),
    });
    this.#workgroups = options.workgroups;
  }

  /** @throws FleetError `gpu` when the kernel does not compile */
  static async create<S extends StepShape = StepShape>(
    options: DispatchOptions<S>,
  ): Promise<Dispatch<S>> {
    return new Dispatch(await options.gpu.pipeline(options), options);
  }

  encode(pass: GPUComputePassEncoder, shape: S): void {
    const [x, y = 1, z = 1] = this.#workgroups(shape);
    if (x === 0 || y === 0 || z === 0) return;
    pass.setPipeline(this.#pipeline);
    pass.setBindGroup(0, this.#bindGroup);
    pass.dispatchWorkgroups(x, y, z);
  }
}
