/**
 * What a worker proves when it joins: every kernel computes what its reference says, and by which
 * bits. Two adapters whose digests are equal computed equal bits here; DESIGN builds exact recovery
 * on that.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import type { Gpu } from "./gpu.ts";
import type { Check, Comparison } from "./self_test/check.ts";
import { checkLinear } from "./self_test/linear_check.ts";
import { checkSampling } from "./self_test/sampling_check.ts";
import {
  checkAttention,
  checkEmbeddingAndNorms,
  checkSwiGlu,
} from "./self_test/transformer_check.ts";
import { Workbench } from "./workbench.ts";

const CHECKS: Check[] = [
  checkLinear,
  checkEmbeddingAndNorms,
  checkAttention,
  checkSwiGlu,
  checkSampling,
];

/** What a self-test that passed has to say. */
export interface SelfTestResult {
  /** SHA-256, in hexadecimal, of all that the kernels wrote. */
  digest: string;
  ms: number;
}

/**
 * Runs every kernel on small fixed inputs.
 *
 * @throws FleetError `gpu` naming the kernel that differs from its reference, and by how much
 */
export async function selfTest(gpu: Gpu, checks = CHECKS): Promise<SelfTestResult> {
  const startedMs = performance.now();
  const written: ArrayBuffer[] = [];
  for (const check of checks) {
    const bench = new Workbench(gpu);
    try {
      for (const comparison of await check(bench)) {
        gpu.check();
        compare(gpu, comparison);
        written.push(comparison.raw);
      }
    } finally {
      bench.destroy();
    }
  }
  const hash = await crypto.subtle.digest("SHA-256", await new Blob(written).arrayBuffer());
  return { digest: new Uint8Array(hash).toHex(), ms: performance.now() - startedMs };
}

/** @throws FleetError `gpu` at the element that is furthest beyond what it may be */
function compare(gpu: Gpu, { kernel, actual, expected, tolerance }: Comparison): void {
  const said = `${gpu.info.name} failed its self-test: ${kernel}`;
  if (actual.length !== expected.length) {
    throw new FleetError(
      "gpu",
      `${said} gave ${actual.length} values instead of ${expected.length}`,
    );
  }
  let worst = -1, excess = 0;
  for (let i = 0; i < actual.length; i++) {
    const beyond = Math.abs(actual[i] - expected[i]) - tolerance(i);
    // NaN is beyond everything.
    if (!(beyond <= excess)) [worst, excess] = [i, Number.isNaN(beyond) ? Infinity : beyond];
  }
  if (worst < 0) return;
  throw new FleetError(
    "gpu",
    `${said} differs from its reference by ${Math.abs(actual[worst] - expected[worst])} at value ` +
      `${worst} (${actual[worst]} instead of ${expected[worst]}, allowed ${tolerance(worst)}); ` +
      "update the GPU's driver, or leave this GPU out",
  );
}
