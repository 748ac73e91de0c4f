/**
 * What the checks of the self-test have in common: their shape and tolerances.
 *
 * @module
 */
import type { Workbench } from "../workbench.ts";

/** What a kernel computed on fixed inputs, beside what it should have. */
export interface Comparison {
  /** The kernel and its variant, for the message. */
  kernel: string;
  actual: ArrayLike<number>;
  expected: ArrayLike<number>;
  /** How far `actual[i]` may be from `expected[i]`. */
  tolerance: (i: number) => number;
  /** All bytes that the kernel wrote, for the digest. */
  raw: ArrayBuffer;
}

/** Runs kernels of one family on small fixed inputs. */
export type Check = (bench: Workbench) => Promise<Comparison[]>;

/** Tolerance of a value that is stored as float16 after float32 arithmetic. */
export function float16Tolerance(expected: ArrayLike<number>): (i: number) => number {
  return (i) => 1e-4 + Math.abs(expected[i]) * 2 ** -10;
}
