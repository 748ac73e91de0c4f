/**
 * Adam over buffers of parameters, with one schedule for all of them.
 *
 * @module
 */
import CODE from "./adam.wgsl" with { type: "text" };
import { lineWorkgroups, type Operation, type Recorder } from "./operation.ts";

/** The betas of `adam.wgsl`. */
const BETA_1 = 0.9, BETA_2 = 0.98;
/** Share of the steps over which the rate rises. */
const WARM_UP = 0.05;
/** What is left of the rate in the end. */
const FLOOR = 0.02;

/** A buffer of `count` four-byte elements. */
export interface Held {
  buffer: GPUBuffer;
  count: number;
}

/** An optimizer whose rate rises shortly and then falls along a cosine. */
export class Adam {
  /** Parameters and moments in the order of {@linkcode update}: with them a run goes on exactly. */
  readonly state: Held[] = [];
  readonly #recorder: Recorder;
  readonly #step: GPUBuffer;

  constructor(recorder: Recorder) {
    this.#recorder = recorder;
    this.#step = recorder.buffer("adam step", 4);
  }

  /**
   * Records the update of `count` parameters.
   *
   * @param rate at the height of the schedule, in the parameters' own unit
   * @param first where the gradient begins in its buffer
   */
  update(
    parameters: GPUBuffer,
    gradient: GPUBuffer,
    count: number,
    rate: number,
    first = 0,
  ): Promise<Operation> {
    const moments = this.#recorder.buffer("moments", 2 * count);
    this.state.push({ buffer: parameters, count }, { buffer: moments, count: 2 * count });
    return this.#recorder.dispatch({
      label: "adam",
      code: CODE,
      constants: [count, { f32: rate }, first, 0],
      buffers: [this.#step, gradient, parameters, moments],
      workgroups: lineWorkgroups(count),
    });
  }

  /** Sets the rate for step `t` of `steps`; takes effect for operations that are run after it. */
  begin(t: number, steps: number): void {
    const warm = Math.min(1, (t + 1) / (WARM_UP * steps));
    const cosine = (1 + Math.cos(Math.PI * t / steps)) / 2;
    this.#recorder.gpu.write(
      this.#step,
      0,
      Float32Array.of(
        warm * (FLOOR + (1 - FLOOR) * cosine),
        1 / (1 - BETA_1 ** (t + 1)),
        1 / (1 - BETA_2 ** (t + 1)),
        0,
      ),
    );
  }
}
