/**
 * Matrices, adapters and formats that tests take the shapes of decode kernels through.
 *
 * @module
 */
import { parseFormatName } from "../../shared/checkpoint/mod.ts";
import { invariant } from "../../shared/errors.ts";
import { type CodeGemmFormat, matrixFormat } from "../../shared/model_config.ts";
import { type CodeOrder, codeOrder, denseOrder } from "./order.ts";
import type { Matrix } from "./types.ts";
import { type Batch, BATCHES } from "./wgsl.ts";
import { type KernelRoom } from "./workgroup_share.ts";

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

/** A matrix, or a stack, as far as the code of kernels depends on it: without its weights. */
export function outlineOf(members: number[], k: number, format: CodeGemmFormat | null): Matrix {
  const n = total(members);
  const shape = [n, k] as const;
  return {
    name: `${members.join("+")} x ${k}`,
    n,
    k,
    order: format === null ? denseOrder(shape) : codeOrder(shape, format, undefined, members),
    format: format && matrixFormat(format, k),
    members: members.map((rows, i) => ({ start: total(members.slice(0, i)), n: rows })),
    blocks: [{ start: 0, n }],
  } as unknown as Matrix;
}

/** A kernel's surroundings. */
export interface DecodeCase {
  format: CodeGemmFormat;
  order: CodeOrder;
  members: number[];
  batch: Batch;
  /** Which of {@linkcode ROOMS}. */
  room: number;
  limits: KernelRoom;
  /** For messages. */
  name: string;
}

/** Every batch of every one of {@linkcode SHAPES} in every one of {@linkcode ROOMS}. */
export function* decodeCases(formats: readonly string[]): Generator<DecodeCase> {
  for (const formatName of formats) {
    const format = formatOf(formatName);
    for (const [members, k] of SHAPES) {
      const n = total(members);
      const order = codeOrder([n, k], format, undefined, members);
      for (const [room, given] of ROOMS.entries()) {
        const limits = { members, bindingRows: n, ...given };
        for (const batch of BATCHES) {
          const name = `${formatName} ${members} x ${k}, ${batch} rows`;
          yield { format, order, members, batch, room, limits, name };
        }
      }
    }
  }
}
