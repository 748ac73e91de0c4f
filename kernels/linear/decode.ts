/**
 * The decode rows of a linear layer: its kernels by batch, and what follows behind their sums.
 *
 * @module
 */
import { FleetError, invariant } from "../../shared/errors.ts";
import type { RowsView } from "../kernel.ts";
import {
  bindGroup,
  chunkRows as rowsOfChunk,
  isVectorInput,
  isVectorOutput,
  layerSplits,
  type Uniforms,
} from "./binding.ts";
import type { CodeKernel } from "./code_kernel.ts";
import { codeKernelFits, turnPositions } from "./code_kernel.ts";
import { codeKernelWgsl } from "./code_wgsl.ts";
import { hasPackedDot } from "./code_words_wgsl.ts";
import { denseKernelBytes, denseKernelWgsl } from "./dense_wgsl.ts";
import { dequantizeKernel } from "./dequantize_kernel.ts";
import { dequantizeKernelWgsl } from "./dequantize_wgsl.ts";
import { int8Kernel } from "./int8_kernel.ts";
import { encodeInt8Rows, type Int8RowsPlan, int8RowsWgsl, planInt8Rows } from "./int8_rows.ts";
import { int8KernelWgsl } from "./int8_wgsl.ts";
import type { Output } from "./output_wgsl.ts";
import { psumbookKernel, workgroupColumns } from "./psumbook_kernel.ts";
import { psumbookKernelWgsl } from "./psumbook_wgsl.ts";
import { int8GroupK } from "./order.ts";
import { REDUCE_BINDINGS, reduceColumns, type ReduceOrder, reduceWgsl } from "./reduce_wgsl.ts";
import type { Int8Rows, LinearOptions, Matrix, PairFinish } from "./types.ts";
import type { DecodeChoice, Variant } from "./variant.ts";
import { choiceOf, codeThreads, decodeFamily, familyBatches, kernelFor } from "./variant.ts";
import type { Batch, Target } from "./wgsl.ts";
import {
  holdsPairs,
  holdsWholeSums,
  shareColumns,
  type WorkgroupShare,
} from "./workgroup_share.ts";

const CODE_BINDINGS = ["uniform", "uniform", "read", "read", "read", "read", "write"] as const;
/** With rows as integers, and their scales last. */
const INT8_BINDINGS = [...CODE_BINDINGS, "read"] as const;
const DENSE_BINDINGS = ["uniform", "uniform", "read", "read", "write"] as const;
/** K that kernels of wide codes and software adapters take at a turn, until autotuning says better. */
const TURN_K = 64;

/** A kernel's code, and how it is dispatched. */
export interface DecodeCode {
  code: string;
  /** Rows of N of a workgroup. */
  columns: number;
  /** Workgroups that share out K; with one, a workgroup has whole sums. */
  splitGroups: number;
  /** Whole sums are finished in the kernel, which is bound to what its output's finish needs. */
  finishes: boolean;
  /** Its input are rows as integers. */
  rounded?: boolean;
}

/** Code that runs behind the sums of a kernel. */
interface ReduceCode {
  code: string;
  /** Rows of N of a workgroup. */
  columns: number;
}

/** All code of the decode rows of a layer. */
export interface DecodeProgram {
  /** By rising batch; none where none fits into workgroup memory. */
  kernels: (DecodeCode & { batch: Batch })[];
  /** Ahead of those whose input are integers; null where there are none. */
  rounding: string | null;
  /** Behind partial sums; and behind whole ones that a kernel could not finish. */
  reduce: ReduceCode | null;
  finish: ReduceCode | null;
}

/** Code, compiled. */
type Compiled<C extends { code: string }> = Omit<C, "code"> & { pipeline: GPUComputePipeline };

type DecodeKernel = Compiled<DecodeCode & { batch: Batch }>;

/** What kernels of one kind of input are bound to. */
interface KernelGroups {
  /** For kernels that store or finish the layer's result themselves. */
  direct: GPUBindGroup;
  /** For those that leave sums in the scratch, and for what comes behind them. */
  partial: GPUBindGroup;
}

/** One chunk of rows of one binding block: what to set and dispatch. */
interface DecodeDispatch {
  inputs: KernelGroups;
  /** Of kernels whose input are integers. */
  int8Inputs: KernelGroups | null;
  reduce: GPUBindGroup | null;
  n: number;
}

/** The decode rows of a range, planned: their {@linkcode DecodeProgram}, compiled and bound. */
export interface DecodePlan {
  /** Rows of one chunk. */
  chunkRows: number;
  kernels: DecodeKernel[];
  reduce: Compiled<ReduceCode> | null;
  finish: Compiled<ReduceCode> | null;
  /** Ahead of kernels whose input are integers. */
  rounding: Int8RowsPlan | null;
  /** `[chunk][binding block]` */
  chunks: DecodeDispatch[][];
}

/** Pairs are finished where whole sums meet: behind partial sums, in one binding, by fours. */
export function canFinish(options: LinearOptions): boolean {
  const { finish, matrix } = options;
  return finish !== undefined && finish.half % 4 === 0 && isVectorOutput(options) &&
    layerSplits(options).splits > 1 && matrix.blocks.length === 1;
}

/**
 * Compiles and binds the kernels of a range.
 *
 * @throws FleetError `gpu`
 */
export async function planDecode(
  options: LinearOptions,
  variant: Variant,
  range: "decode" | "outputs",
  uniforms: Uniforms,
): Promise<DecodePlan> {
  const { gpu, label, matrix, step, input, output, scratch, store, maxRows } = options;
  const chunkRows = rowsOfChunk(options);
  const finish = range === "decode" && canFinish(options) ? options.finish : undefined;
  const whole: Output = { store, vector: isVectorOutput(options), finish };
  const bindings = matrix.order.kind === "code" ? CODE_BINDINGS : DENSE_BINDINGS;
  const finishBindings = [...bindings, ...finish?.bindings ?? []];
  const reduceBindings = [...REDUCE_BINDINGS, ...finish?.bindings ?? []];

  const int8 = decodeFamily(matrix, options.profile) === "int8";
  const books = int8 ? matrix.int8Codebooks : matrix.codebooks;

  const batches = variant.batches.filter((batch) => batch <= chunkRows);
  const program = decodeProgram(options, { ...variant, batches }, whole);
  if (program.kernels.length === 0) {
    throw new FleetError(
      "gpu",
      `${matrix.name} needs more workgroup memory than the ` +
        `${gpu.limits.maxComputeWorkgroupStorageSize} bytes that ${gpu.info.name} offers`,
    );
  }
  const kernels: DecodeKernel[] = [];
  for (const { code, ...kernel } of program.kernels) {
    const pipeline = await gpu.pipeline({
      label: `${label} x${kernel.batch}`,
      code,
      bindings: kernel.rounded ? INT8_BINDINGS : kernel.finishes ? finishBindings : bindings,
    });
    kernels.push({ ...kernel, pipeline });
  }
  const compiled = async (reduction: ReduceCode | null) => {
    if (reduction === null) return null;
    const { code, columns } = reduction;
    const pipeline = await gpu.pipeline({
      label: `${label} reduce`,
      code,
      bindings: reduceBindings,
    });
    return { pipeline, columns };
  };
  const reduce = await compiled(program.reduce);
  const finishing = await compiled(program.finish);

  const finishes = kernels.some((kernel) => kernel.finishes);
  const rounded = program.rounding !== null;
  const { int8Rows } = options;
  invariant(!rounded || int8Rows, `${label} has buffers for rows as integers`);
  const chunks: DecodeDispatch[][] = [];
  for (let base = 0; base < maxRows; base += chunkRows) {
    chunks.push(matrix.blocks.map((block) => {
      const params = uniforms.add(block, { row_base: base, row_cap: chunkRows, range });
      const weights = matrix.order.kind === "code"
        ? [block.weights, books!, block.scales!]
        : [block.weights];
      const into = (...target: GPUBuffer[]) =>
        bindGroup(gpu, `${label} ${range}`, target.length > 1 ? finishBindings : bindings, [
          step,
          params,
          input.buffer,
          ...weights,
          ...target,
        ]);
      const int8Into = ({ values, largest }: Int8Rows, target: GPUBuffer) =>
        bindGroup(gpu, `${label} ${range}, int8`, INT8_BINDINGS, [
          step,
          params,
          values,
          ...weights,
          target,
          largest,
        ]);
      return {
        inputs: {
          direct: finishes ? into(output.buffer, ...finish!.buffers) : into(output.buffer),
          partial: into(scratch),
        },
        int8Inputs: rounded
          ? {
            direct: int8Into(int8Rows!, output.buffer),
            partial: int8Into(int8Rows!, scratch),
          }
          : null,
        reduce: (reduce ?? finishing) === null
          ? null
          : bindGroup(gpu, `${label} reduce`, reduceBindings, [
            step,
            params,
            scratch,
            output.buffer,
            ...finish?.buffers ?? [],
          ]),
        n: block.n,
      };
    }));
  }
  const rounding = program.rounding === null
    ? null
    : await planInt8Rows(options, int8Rows!, program.rounding, range, uniforms);
  return { chunkRows, kernels, reduce, finish: finishing, rounding, chunks };
}

/** Adds the dispatches for `rows` rows to the pass. */
export function encodeDecode(
  pass: GPUComputePassEncoder,
  plan: DecodePlan,
  rows: number,
  { name }: Matrix,
): void {
  let rounded = false;
  for (let c = 0, from = 0; from < rows; c++, from += plan.chunkRows) {
    invariant(c < plan.chunks.length, `${name} was bound for fewer than ${rows} rows`);
    const count = Math.min(plan.chunkRows, rows - from);
    const kernel = kernelFor(plan.kernels, count);
    if (kernel.rounded && !rounded) {
      encodeInt8Rows(pass, plan.rounding!, rows);
      rounded = true;
    }
    const behind = kernel.splitGroups > 1 ? plan.reduce : kernel.finishes ? null : plan.finish;
    for (const dispatch of plan.chunks[c]) {
      const { direct, partial } = kernel.rounded ? dispatch.int8Inputs! : dispatch.inputs;
      pass.setPipeline(kernel.pipeline);
      pass.setBindGroup(0, behind ? partial : direct);
      pass.dispatchWorkgroups(
        Math.ceil(dispatch.n / kernel.columns),
        kernel.splitGroups,
        Math.ceil(count / kernel.batch),
      );
      if (behind) {
        pass.setPipeline(behind.pipeline);
        pass.setBindGroup(0, dispatch.reduce);
        pass.dispatchWorkgroups(Math.ceil(dispatch.n / behind.columns), count);
      }
    }
  }
}

/** What decides the code of decode rows, beside variant, batch and target. */
type DecodeOptions = Pick<LinearOptions, "gpu" | "matrix" | "profile"> & {
  input: Pick<RowsView, "stride" | "offset">;
};

/**
 * All code of a layer's decode rows in the batches of a variant.
 *
 * @param whole where whole sums go
 */
export function decodeProgram(
  options: DecodeOptions,
  variant: Variant,
  whole: Output,
): DecodeProgram {
  const family = decodeFamily(options.matrix, options.profile);
  const kernels = familyBatches(variant, family).flatMap((batch) => {
    const made = decodeCode(options, variant, batch, whole);
    return made === null ? [] : [{ batch, ...made }];
  });
  const reduction = (order: ReduceOrder): ReduceCode => ({
    code: reduceWgsl(order, whole),
    columns: reduceColumns(order, whole),
  });
  const partial = kernels.some(({ splitGroups }) => splitGroups > 1);
  const unfinished = whole.finish !== undefined &&
    kernels.some(({ splitGroups, finishes }) => splitGroups === 1 && !finishes);
  return {
    kernels,
    rounding: kernels.some(({ rounded }) => rounded)
      ? int8RowsWgsl(int8GroupK(options.matrix), hasPackedDot())
      : null,
    reduce: partial ? reduction(layerSplits(options)) : null,
    finish: unfinished ? reduction({ splits: 1, slices: 1 }) : null,
  };
}

/**
 * A decode kernel, or null when it does not fit into workgroup memory.
 *
 * @param whole where whole sums go: those that the kernel cannot finish, to the scratch, like partial
 * ones
 */
export function decodeCode(
  options: DecodeOptions,
  variant: Variant,
  batch: Batch,
  whole: Output,
): DecodeCode | null {
  const { gpu: { limits }, matrix: { order, format, members, blocks }, profile } = options;
  const workgroupBytes = limits.maxComputeWorkgroupStorageSize;
  const { finish } = whole;
  const stored: Target = finish ? "partial" : whole.store;
  if (order.kind === "dense") {
    if (denseKernelBytes(batch) > workgroupBytes) return null;
    const target = order.splits > 1 ? "partial" : stored;
    const code = denseKernelWgsl({ batch, rowsPerThread: variant.denseRowsPerThread, target });
    return { code, columns: order.rowBlock, splitGroups: order.splits, finishes: false };
  }
  const family = decodeFamily(options.matrix, profile);
  invariant(format !== null && family !== "dense", "a code order has a format");
  const choice = choiceOf(variant, batch);
  const maxThreads = limits.maxComputeInvocationsPerWorkgroup;
  const room = {
    members: members.map(({ n }) => n),
    bindingRows: blocks[0].n,
    maxThreads,
    workgroupBytes,
  };
  if (family === "dequantize" && isVectorInput(options)) {
    const shaped = (choice: DecodeChoice) =>
      dequantizeKernel(format, order, batch, { ...variant, ...choice }, room);
    const made = sharedCode(options, shaped, choice, whole, dequantizeKernelWgsl);
    if (made !== null) return made.code;
  }
  if (family === "int8") {
    invariant(isVectorInput(options), "rows of a K of whole words begin at fours");
    const shaped = (choice: DecodeChoice) => int8Kernel(format, order, batch, choice, room);
    const made = sharedCode(
      options,
      shaped,
      choice,
      whole,
      (kernel, target) => int8KernelWgsl(kernel, members.length, target),
    );
    return made && { ...made.code, rounded: made.kernel.rounded };
  }
  const { splits } = layerSplits(options);
  const target = splits > 1 ? "partial" : stored;
  if (family === "codegemm" && variant.unroll) {
    const kernel = psumbookKernel(format, order, batch, choice, room, isVectorInput(options));
    return kernel && {
      code: psumbookKernelWgsl(kernel, target),
      columns: workgroupColumns(kernel),
      splitGroups: splits,
      finishes: false,
    };
  }
  // Sixteen rows are for the dequantizing kernel alone: this one would run out of registers.
  if (batch > 8) return null;
  const { threads, perThread } = codeThreads(order, family, batch, choice, maxThreads);
  const vectorInput = isVectorInput(options) && format.v % 4 === 0;
  const kernel: CodeKernel = {
    family,
    format,
    order,
    threads,
    turnPositions: turnPositions(order, format, family, choice.turnK ?? TURN_K),
    unroll: variant.unroll && format.v % 4 === 0,
    rowsPerThread: perThread,
    prefetch: choice.prefetch ?? false,
    vectorInput,
    batch,
    workgroupBytes,
    target,
  };
  if (!codeKernelFits(kernel)) return null;
  return {
    code: codeKernelWgsl(kernel),
    columns: threads * perThread,
    splitGroups: splits,
    finishes: false,
  };
}

/**
 * The code of a kernel whose workgroups may have whole sums, or null where no shape fits.
 *
 * @param shaped the kernel of a choice of shape
 */
function sharedCode<K extends WorkgroupShare>(
  { gpu: { limits } }: DecodeOptions,
  shaped: (choice: DecodeChoice) => K | null,
  choice: DecodeChoice,
  whole: Output,
  code: (kernel: K, target: Output | "partial") => string,
): { kernel: K; code: DecodeCode } | null {
  const { finish } = whole;
  const chosen = shaped(choice);
  // A dispatch behind the kernel costs more than a chosen shape gains over the usual one.
  const usual = { ...choice, codeThreads: undefined, codeRowsPerThread: undefined };
  const finishing = finish &&
    [chosen, shaped(usual)].find((kernel) => kernel && canFinishIn(kernel, finish, limits));
  const kernel = finishing ?? chosen;
  if (kernel === null) return null;
  const finishes = kernel === finishing;
  const leaves = !holdsWholeSums(kernel) || finish && !finishes;
  return {
    kernel,
    code: {
      code: code(kernel, leaves ? "partial" : whole),
      columns: shareColumns(kernel),
      splitGroups: kernel.order.dequantize.splits / kernel.splits,
      finishes,
    },
  };
}

/** Whether a kernel can finish its sums itself, bound to the buffers of both. */
function canFinishIn(
  kernel: WorkgroupShare,
  { half, bindings }: PairFinish,
  { maxStorageBuffersPerShaderStage }: GPUSupportedLimits,
): boolean {
  const buffers = [...CODE_BINDINGS, ...bindings].filter((kind) => kind !== "uniform").length;
  return holdsPairs(kernel, half) && buffers <= maxStorageBuffersPerShaderStage;
}
