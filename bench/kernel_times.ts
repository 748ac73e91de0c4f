/**
 * GPU time of a step by kernel: while it is open, every dispatch gets a pass and two timestamps of its
 * own. Gaps between dispatches are not counted, and overlap is lost: the sum says less than a step's
 * own time, the shares say where to look.
 *
 * @module
 */
import type { Gpu } from "../kernels/gpu.ts";

const MOST_DISPATCHES = 2048;

/** Microseconds and dispatches of one kind of kernel within one step. */
export interface KernelTime {
  kernel: string;
  microseconds: number;
  dispatches: number;
}

/** Runs `step`, which encodes and submits one step, and says what each kernel took. */
export async function timeKernels(gpu: Gpu, step: () => Promise<void>): Promise<KernelTime[]> {
  const { device } = gpu;
  const querySet = device.createQuerySet({ type: "timestamp", count: 2 * MOST_DISPATCHES });
  const resolved = gpu.buffer(
    "kernel timestamps",
    16 * MOST_DISPATCHES,
    GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC,
  );
  const labels: string[] = [];
  const createEncoder = device.createCommandEncoder.bind(device);
  device.createCommandEncoder = (descriptor) => {
    const encoder = createEncoder(descriptor);
    encoder.beginComputePass = passPerDispatch(encoder, querySet, labels);
    return encoder;
  };
  try {
    await step();
  } finally {
    device.createCommandEncoder = createEncoder;
  }
  const encoder = device.createCommandEncoder();
  encoder.resolveQuerySet(querySet, 0, 2 * labels.length, resolved, 0);
  device.queue.submit([encoder.finish()]);
  const stamps = new BigUint64Array(await gpu.read(resolved, 16 * labels.length));
  querySet.destroy();
  resolved.destroy();
  const times = new Map<string, KernelTime>();
  for (const [i, kernel] of labels.entries()) {
    const time = times.get(kernel) ?? { kernel, microseconds: 0, dispatches: 0 };
    time.microseconds += Number(stamps[2 * i + 1] - stamps[2 * i]) / 1e3;
    time.dispatches++;
    times.set(kernel, time);
  }
  return [...times.values()].toSorted((a, b) => b.microseconds - a.microseconds);
}

/** A stand-in for `beginComputePass` of an encoder. */
function passPerDispatch(
  encoder: GPUCommandEncoder,
  querySet: GPUQuerySet,
  labels: string[],
): GPUCommandEncoder["beginComputePass"] {
  const begin = encoder.beginComputePass.bind(encoder);
  return (descriptor) => {
    let pipeline: GPUComputePipeline;
    let group: GPUBindGroup;
    const pass = {
      setPipeline: (next: GPUComputePipeline) => void (pipeline = next),
      setBindGroup: (_index: number, next: GPUBindGroup) => void (group = next),
      dispatchWorkgroups(x: number, y?: number, z?: number) {
        const at = 2 * labels.length;
        const real = begin({
          timestampWrites: {
            querySet,
            beginningOfPassWriteIndex: at,
            endOfPassWriteIndex: at + 1,
          },
        });
        real.setPipeline(pipeline);
        real.setBindGroup(0, group);
        real.dispatchWorkgroups(x, y, z);
        real.end();
        labels.push(kernelName(pipeline.label));
      },
      // The step's own two timestamps stay valid.
      end: () => begin(descriptor).end(),
    };
    return pass as unknown as GPUComputePassEncoder;
  };
}

/** `model.layers.3.mlp.down_proj reduce` is a kernel of all layers alike. */
function kernelName(label: string): string {
  return label.replace(/^(model\.)?layers?\.\d+\./, "");
}
