/**
 * What those decode kernels of CodeGEMM matrices are generated from that serve any adapter and any
 * width of codes, and what both ways of generating them share. GPUs have others for codes of 8 bits:
 * `psumbook_kernel.ts` and `dequantize_kernel.ts`.
 *
 * @module
 */
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";
import type { NumericsProfile } from "../../shared/protocol.ts";
import type { CodeOrder } from "./order.ts";
import { familyOrder, largestDivisor, lcm } from "./order.ts";
import type { Batch, BatchLanes, Target } from "./wgsl.ts";
import { spread, times } from "./wgsl.ts";

/** One kernel. Nothing but family, format and order decides a bit of its result. */
export interface CodeKernel {
  family: NumericsProfile["decode"];
  format: CodeGemmFormat;
  order: CodeOrder;
  /** Threads of a workgroup; `threads * rowsPerThread` divides the order's row block. */
  threads: number;
  /** Rows of N a thread holds: 4 or 8. */
  rowsPerThread: number;
  /** Rows of the step that a workgroup takes. */
  batch: Batch;
  /** Positions of a turn, whose activations or codes are loaded together; see {@linkcode turnPositions}. */
  turnPositions: number;
  /** Every position of a turn as code of its own, or loops; only where codes are dequantized. */
  unroll: boolean;
  /** Code words are loaded a turn ahead: less waiting, more registers (unrolled). */
  prefetch: boolean;
  /** Rows of the input begin at multiples of 4 elements, so it is bound as vectors of 4 (unrolled). */
  vectorInput: boolean;
  /** Workgroup memory that may be used. */
  workgroupBytes: number;
  target: Target;
}

/** The parts of a kernel that differ between families and ways of generating. */
export interface CodeBody {
  /** Module scope. */
  declarations: string;
  /** Once, before the first turn. */
  prologue: string;
  /** Positions `[turn * turnPositions, (turn + 1) * turnPositions)`. */
  turn: string;
}

/**
 * The largest number of positions within `wantedK` of K that a kernel can take at a turn: whole code
 * words and whole float16 groups.
 */
export function turnPositions(
  order: CodeOrder,
  format: CodeGemmFormat,
  family: NumericsProfile["decode"],
  wantedK: number,
): number {
  const { unitPositions, groupPositions } = familyOrder(order, family);
  const step = lcm(codesPerWord(format), groupPositions);
  return largestDivisor(unitPositions, Math.max(step, Math.floor(wantedK / format.v)), step);
}

/** Whether workgroup memory holds what loops need: a Psumbook at least, or two turns' activations. */
export function codeKernelFits(kernel: CodeKernel): boolean {
  if (kernel.unroll) return true;
  return kernel.family === "codegemm"
    ? psumbooksPerStage(kernel) >= 1
    : 2 * activationBytes(kernel) <= kernel.workgroupBytes;
}

/** Bytes of the activations of one turn. */
export function activationBytes({ turnPositions, format, batch }: CodeKernel): number {
  return turnPositions * format.v * 2 * batch;
}

/** How many Psumbooks, of one position and codebook each, stand in workgroup memory at a time. */
export function psumbooksPerStage(kernel: CodeKernel): number {
  const free = kernel.workgroupBytes - activationBytes(kernel);
  const psumbookBytes = 256 * 2 * kernel.batch;
  return Math.min(
    kernel.turnPositions * kernel.format.m,
    Math.floor(free / psumbookBytes),
  );
}

/**
 * The activations of a turn into `activations0`, `activations1`, turned so that a vector holds all
 * rows at one K.
 *
 * @param base WGSL that is added to the index
 */
export function loadActivations(kernel: CodeKernel, lanes: BatchLanes, base: string): string {
  const count = kernel.turnPositions * kernel.format.v;
  const body = times(lanes.vectors, (j) => {
    const loads = Array.from(
      { length: lanes.lanes },
      (_, l) => `x[x${j * lanes.lanes + l} + at]`,
    );
    return `activations${j}[${base}i] = ${lanes.type("f16")}(${loads.join(", ")});`;
  });
  return spread(
    count,
    kernel.threads,
    kernel.unroll,
    `let at = turn * ${count}u + i;\n${body}`,
  );
}

/** The float16 sum of a group, for every row of N that a thread holds. */
export function sumVariables(kernel: CodeKernel, lanes: BatchLanes, name = "sum"): string {
  return times(
    kernel.rowsPerThread,
    (r) => times(lanes.vectors, (j) => `  var ${name}${r}_${j} = ${lanes.type("f16")}(0.0);`),
  );
}

/** WGSL that adds a group's float16 sum, scaled, to the float32 accumulator of row `r`. */
export function addGroup(lanes: BatchLanes, scale: string, r: number, j: number): string {
  const factor = splat(lanes, "f32", scale);
  return `acc${r}_${j} = fma(${factor}, ${lanes.type("f32")}(sum${r}_${j}), acc${r}_${j});`;
}

/** A scalar in every lane of a batch vector. */
export function splat(lanes: BatchLanes, element: "f16" | "f32", scalar: string): string {
  return lanes.lanes === 1 ? scalar : `${lanes.type(element)}(${scalar})`;
}
