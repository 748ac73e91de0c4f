/**
 * A linear layer bound to its buffers: picks and compiles the kernels of its ranges once, then
 * encodes a step with nothing but pipelines, bind groups and dispatches.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { RowRange } from "../kernel.ts";
import { bindGroup, isVectorInput, Uniforms } from "./binding.ts";
import { canFinish, type DecodePlan, encodeDecode, planDecode } from "./decode.ts";
import type { PrefillTile } from "./prefill_wgsl.ts";
import { prefillBytes, prefillThreads, prefillWgsl } from "./prefill_wgsl.ts";
import type { Linear, LinearOptions } from "./types.ts";
import type { Variant } from "./variant.ts";
import { defaultVariant } from "./variant.ts";

const CODE_PREFILL_BINDINGS = [
  "uniform",
  "uniform",
  "read",
  "write",
  "read",
  "read",
  "read",
] as const;
const DENSE_PREFILL_BINDINGS = ["uniform", "uniform", "read", "write", "read"] as const;

interface PrefillPlan {
  pipelines: { tile: PrefillTile; pipeline: GPUComputePipeline }[];
  blocks: { group: GPUBindGroup; n: number }[];
}

/**
 * Binds a matrix to an input, an output and a way to store, and compiles its kernels.
 *
 * @throws FleetError `gpu` when a kernel does not compile or the adapter's limits cannot hold it
 */
export async function createLinear(options: LinearOptions): Promise<Linear> {
  const { label, gpu, ranges, matrix } = options;
  const variant = { ...defaultVariant(gpu.info.software), ...options.variant };
  const uniforms = new Uniforms(options);
  let decode: DecodePlan | null = null;
  let prefill: PrefillPlan | null = null;
  const plans: Partial<Record<RowRange, DecodePlan>> = {};
  for (const range of ranges) {
    if (range === "prefill") {
      prefill = await planPrefill(options, variant, uniforms);
    } else {
      decode = await planDecode(options, variant, range, uniforms);
      plans[range] = decode;
    }
  }
  uniforms.upload(gpu);
  gpu.check();
  return {
    label,
    finishes: options.finish !== undefined && canFinish(options),
    encode(pass, shape, range) {
      if (range === "prefill") {
        invariant(prefill !== null, `${label} was made for prefill rows`);
        encodePrefill(pass, prefill, shape.rows - shape.decodeRows);
      } else {
        const plan = plans[range];
        invariant(plan !== undefined, `${label} was made for ${range} rows`);
        const rows = range === "decode" ? shape.decodeRows : shape.outputs;
        encodeDecode(pass, plan, rows, matrix);
      }
    },
    destroy: () => uniforms.buffer.destroy(),
  };
}

function encodePrefill(pass: GPUComputePassEncoder, plan: PrefillPlan, rows: number): void {
  if (rows === 0) return;
  let kernel = plan.pipelines[plan.pipelines.length - 1];
  for (const candidate of plan.pipelines) {
    if (candidate.tile.rows >= rows) {
      kernel = candidate;
      break;
    }
  }
  pass.setPipeline(kernel.pipeline);
  for (const block of plan.blocks) {
    pass.setBindGroup(0, block.group);
    pass.dispatchWorkgroups(
      Math.ceil(block.n / kernel.tile.columns),
      Math.ceil(rows / kernel.tile.rows),
    );
  }
}

async function planPrefill(
  options: LinearOptions,
  variant: Variant,
  uniforms: Uniforms,
): Promise<PrefillPlan> {
  const { gpu, label, matrix, step, input, output, store, maxRows } = options;
  const { order, format } = matrix;
  const workgroupBytes = gpu.limits.maxComputeWorkgroupStorageSize;
  const code = order.kind === "code" && format !== null ? { format, order } : null;
  const bindings = code ? CODE_PREFILL_BINDINGS : DENSE_PREFILL_BINDINGS;
  const pipelines: PrefillPlan["pipelines"] = [];
  for (const tile of variant.prefillTiles) {
    if (prefillThreads(tile) > gpu.limits.maxComputeInvocationsPerWorkgroup) continue;
    if (prefillBytes({ tile, code }) > workgroupBytes) continue;
    pipelines.push({
      tile,
      pipeline: await gpu.pipeline({
        label: `${label} prefill`,
        code: prefillWgsl({
          tile,
          code,
          vectorInput: isVectorInput(options),
          unroll: variant.unroll,
          workgroupBytes,
          store,
        }),
        bindings,
      }),
    });
  }
  invariant(pipelines.length > 0, "a prefill tile fits WebGPU's default limits");
  const blocks = matrix.blocks.map((block) => ({
    n: block.n,
    group: bindGroup(gpu, `${label} prefill`, bindings, [
      step,
      uniforms.add(block, { row_base: 0, row_cap: maxRows, range: "prefill" }),
      input.buffer,
      output.buffer,
      block.weights,
      ...(code ? [matrix.codebooks!, block.scales!] : []),
    ]),
  }));
  return { pipelines, blocks };
}
