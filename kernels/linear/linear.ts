/**
 * A linear layer bound to its buffers: picks and compiles the kernels of its ranges once, then
 * encodes a step with nothing but pipelines, bind groups and dispatches.
 *
 * @module
 */
import { invariant } from "../../shared/errors.ts";
import type { RowRange } from "../kernel.ts";
import { Uniforms } from "./binding.ts";
import { canFinish, type DecodePlan, encodeDecode, planDecode } from "./decode.ts";
import { encodePrefill, planPrefill, type PrefillPlan } from "./prefill.ts";
import type { Linear, LinearOptions } from "./types.ts";
import { defaultVariant } from "./variant.ts";

/**
 * Binds a matrix to an input, an output and a way to store, and compiles its kernels.
 *
 * @throws FleetError `gpu` when a kernel does not compile or the adapter's limits cannot hold it
 */
export async function createLinear(options: LinearOptions): Promise<Linear> {
  const { label, gpu, ranges, matrix } = options;
  const variant = { ...defaultVariant(gpu.info.software), ...options.variant };
  const uniforms = new Uniforms(options);
  let prefill: PrefillPlan | null = null;
  const plans: Partial<Record<RowRange, DecodePlan>> = {};
  for (const range of ranges) {
    if (range === "prefill") {
      prefill = await planPrefill(options, variant, uniforms);
    } else {
      plans[range] = await planDecode(options, variant, range, uniforms);
    }
  }
  uniforms.upload(gpu);
  gpu.check();
  return {
    label,
    finishes: canFinish(options),
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
