/**
 * Matrices, adapters and formats that tests take the shapes of decode kernels through.
 *
 * @module
 */
import { parseFormatName } from "../../shared/checkpoint/mod.ts";
import { invariant } from "../../shared/errors.ts";
import type { CodeGemmFormat } from "../../shared/model_config.ts";

/** Stacks of N, and K: Llama-3 70B's, 8B's, then small and uneven ones. */
export const SHAPES: readonly [members: number[], k: number][] = [
  [[8192, 1024, 1024], 8192],
  [[28672, 28672], 8192],
  [[8192], 28672],
  [[8192], 8192],
  [[4096, 1024, 1024], 4096],
  [[14336, 14336], 4096],
  [[4096], 14336],
  [[70], 384],
  [[256, 512, 256], 640],
  [[256, 512, 256], 1152],
];

/** What adapters offer a workgroup; the last is what WebGPU guarantees. */
export const ROOMS = [
  { maxThreads: 1024, workgroupBytes: 48 * 1024 },
  { maxThreads: 1024, workgroupBytes: 32 * 1024 },
  { maxThreads: 256, workgroupBytes: 16 * 1024 },
] as const;

/** The format of this name. */
export function formatOf(name: string): CodeGemmFormat {
  const format = parseFormatName(name);
  invariant(format !== null, `${name} is a format`);
  return format;
}

/** Rows of N of a stack. */
export function total(members: readonly number[]): number {
  return members.reduce((sum, rows) => sum + rows, 0);
}
