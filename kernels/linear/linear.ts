/**
 * A linear layer bound to its buffers: picks and compiles the kernels of its ranges once, then
 * encodes a step with nothing but pipelines, bind groups and dispatches.
 *
 * @module
 */
import { FleetError, invariant } from "../../shared/errors.ts";
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import type { BindingKind, Gpu } from "../gpu.ts";
import type { RowRange, RowsView } from "../kernel.ts";
import { STEP_BYTES } from "../kernel.ts";
import type { CodeKernel } from "./code_kernel.ts";
import { codeKernelFits, turnPositions } from "./code_kernel.ts";
import { codeKernelWgsl } from "./code_wgsl.ts";
import { denseKernelBytes, denseKernelWgsl } from "./dense_wgsl.ts";
import { codeOrder, denseOrder, roundUp } from "./order.ts";
import type { PrefillTile } from "./prefill_wgsl.ts";
import { prefillBytes, prefillThreads, prefillWgsl } from "./prefill_wgsl.ts";
import { reduceColumns, reduceWgsl } from "./reduce_wgsl.ts";
import type { Linear, LinearOptions, Matrix, MatrixBlock, MatrixShape } from "./types.ts";
import type { Variant } from "./variant.ts";
import { codeThreads, decodeFamily, defaultVariant, familyBatches } from "./variant.ts";
import type { Batch, Params, Target } from "./wgsl.ts";
import { PARAM_BYTES, PARAM_WORDS, RANGE_CODES } from "./wgsl.ts";

/** Rows that the scratch holds are a multiple of this, or a power of two below it. */
const MAX_BATCH = 8;
/** Scratch beyond which more rows take more dispatches instead. */
const SCRATCH_BYTES = 64 * 1024 * 1024;

const CODE_BINDINGS = ["uniform", "uniform", "read", "read", "read", "read", "write"] as const;
const DENSE_BINDINGS = ["uniform", "uniform", "read", "read", "write"] as const;
const REDUCE_BINDINGS = ["uniform", "uniform", "read", "write"] as const;
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

/**
 * Scratch that a linear layer wants for its partial sums, bytes; 16 when it needs none.
 *
 * @param maxRows rows of the largest range that runs decode kernels
 */
export function linearScratchBytes(
  shape: MatrixShape,
  format: CodeGemmFormat | null,
  maxRows: number,
  order = format === null ? denseOrder(shape) : codeOrder(shape, format),
): number {
  if (order.splits === 1) return 16;
  const row = partialRowBytes(shape[0], order);
  const affordable = Math.max(1, Math.floor(SCRATCH_BYTES / row / MAX_BATCH)) * MAX_BATCH;
  return row * Math.min(roundUp(maxRows, MAX_BATCH), affordable);
}

/** One chunk of rows of one binding block: what to set and dispatch. */
interface DecodeDispatch {
  main: GPUBindGroup;
  reduce: GPUBindGroup | null;
  n: number;
  reduceGroups: number;
}

interface DecodePlan {
  /** Rows of one chunk. */
  chunkRows: number;
  splits: number;
  /** By rising batch; a workgroup covers `columns` rows of N. */
  pipelines: { batch: Batch; columns: number; pipeline: GPUComputePipeline }[];
  reduce: GPUComputePipeline | null;
  /** `[chunk][binding block]` */
  chunks: DecodeDispatch[][];
}

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
    finishes: options.finish !== undefined && canFinish(matrix),
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

/** Whether the input can be bound as vectors of 4. */
function isVectorInput({ input, matrix: { k } }: Pick<DecodeOptions, "input" | "matrix">): boolean {
  return [input.stride, input.offset, k].every((elements) => elements % 4 === 0);
}

/** Pairs are finished where whole sums meet: behind partial sums, in one binding. */
function canFinish({ order, blocks }: Matrix): boolean {
  return order.splits > 1 && blocks.length === 1;
}

function encodeDecode(
  pass: GPUComputePassEncoder,
  plan: DecodePlan,
  rows: number,
  matrix: Matrix,
): void {
  for (let c = 0, from = 0; from < rows; c++, from += plan.chunkRows) {
    invariant(c < plan.chunks.length, `${matrix.name} was bound for fewer than ${rows} rows`);
    const count = Math.min(plan.chunkRows, rows - from);
    const kernel = smallestHolding(plan.pipelines, count);
    for (const dispatch of plan.chunks[c]) {
      pass.setPipeline(kernel.pipeline);
      pass.setBindGroup(0, dispatch.main);
      pass.dispatchWorkgroups(
        Math.ceil(dispatch.n / kernel.columns),
        plan.splits,
        Math.ceil(count / kernel.batch),
      );
      if (plan.reduce !== null) {
        pass.setPipeline(plan.reduce);
        pass.setBindGroup(0, dispatch.reduce);
        pass.dispatchWorkgroups(dispatch.reduceGroups, count);
      }
    }
  }
}

function smallestHolding(kernels: DecodePlan["pipelines"], rows: number) {
  for (const kernel of kernels) if (kernel.batch >= rows) return kernel;
  return kernels[kernels.length - 1];
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

async function planDecode(
  options: LinearOptions,
  variant: Variant,
  range: "decode" | "outputs",
  uniforms: Uniforms,
): Promise<DecodePlan> {
  const { gpu, label, matrix, step, input, output, scratch, store, maxRows } = options;
  const { order } = matrix;
  const direct = order.splits === 1;
  const chunkRows = direct ? roundUp(maxRows, MAX_BATCH) : scratchRows(options);
  const target: Target = direct ? store : "partial";
  const bindings = order.kind === "code" ? CODE_BINDINGS : DENSE_BINDINGS;

  const pipelines: DecodePlan["pipelines"] = [];
  const family = matrix.format === null ? "dense" : decodeFamily(matrix.format, options.profile);
  for (const batch of familyBatches(variant, family)) {
    const made = batch <= chunkRows ? decodeCode(options, variant, batch, target) : null;
    if (made === null) continue;
    const { code, columns } = made;
    const pipeline = await gpu.pipeline({ label: `${label} x${batch}`, code, bindings });
    pipelines.push({ batch, columns, pipeline });
  }
  if (pipelines.length === 0) {
    throw new FleetError(
      "gpu",
      `${matrix.name} needs more workgroup memory than the ` +
        `${gpu.limits.maxComputeWorkgroupStorageSize} bytes that ${gpu.info.name} offers`,
    );
  }
  const finish = range === "decode" && canFinish(matrix) ? options.finish : undefined;
  const reduceBindings = [...REDUCE_BINDINGS, ...finish?.bindings ?? []];
  const reduce = direct ? null : await gpu.pipeline({
    label: `${label} reduce`,
    code: reduceWgsl(order, store, finish),
    bindings: reduceBindings,
  });

  const target0 = direct ? output.buffer : scratch;
  const chunks: DecodeDispatch[][] = [];
  for (let base = 0; base < maxRows; base += chunkRows) {
    chunks.push(matrix.blocks.map((block) => {
      const params = uniforms.add(block, { row_base: base, row_cap: chunkRows, range });
      const weights = order.kind === "code"
        ? [block.weights, matrix.codebooks!, block.scales!]
        : [block.weights];
      return {
        main: bindGroup(gpu, `${label} ${range}`, bindings, [
          step,
          params,
          input.buffer,
          ...weights,
          target0,
        ]),
        reduce: reduce === null ? null : bindGroup(gpu, `${label} reduce`, reduceBindings, [
          step,
          params,
          scratch,
          output.buffer,
          ...finish?.buffers ?? [],
        ]),
        n: block.n,
        reduceGroups: Math.ceil(block.n / (finish ? 2 : 1) / reduceColumns(order.slices)),
      };
    }));
  }
  return { chunkRows, splits: order.splits, pipelines, reduce, chunks };
}

/** What decides a decode kernel's code, beside variant, batch and target. */
type DecodeOptions = Pick<LinearOptions, "gpu" | "matrix" | "profile"> & {
  input: Pick<RowsView, "stride" | "offset">;
};

/** A decode kernel, or null when it does not fit into workgroup memory. */
export function decodeCode(
  options: DecodeOptions,
  variant: Variant,
  batch: Batch,
  target: Target,
): { code: string; columns: number } | null {
  const { gpu: { limits }, matrix: { order, format }, profile } = options;
  const workgroupBytes = limits.maxComputeWorkgroupStorageSize;
  if (order.kind === "dense") {
    if (denseKernelBytes(batch) > workgroupBytes) return null;
    const code = denseKernelWgsl({ batch, rowsPerThread: variant.denseRowsPerThread, target });
    return { code, columns: order.rowBlock };
  }
  invariant(format !== null, "a code order has a format");
  const family = decodeFamily(format, profile);
  const { threads, perThread } = codeThreads(
    order,
    family,
    batch,
    variant,
    limits.maxComputeInvocationsPerWorkgroup,
  );
  const vectorInput = isVectorInput(options) && format.v % 4 === 0;
  const kernel: CodeKernel = {
    family,
    format,
    order,
    threads,
    turnPositions: turnPositions(order, format, variant.turnK),
    unroll: variant.unroll && (family === "codegemm" || format.v % 4 === 0),
    rowsPerThread: perThread,
    prefetch: variant.prefetch,
    vectorInput,
    batch,
    workgroupBytes,
    target,
  };
  if (!codeKernelFits(kernel)) return null;
  return { code: codeKernelWgsl(kernel), columns: threads * perThread };
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

/** Bytes of one row's partial sums. */
function partialRowBytes(n: number, order: Matrix["order"]): number {
  return order.splits * roundUp(n, order.rowBlock) * 4;
}

/** Rows whose partial sums the scratch holds. */
function scratchRows({ gpu, matrix, scratch, maxRows, label }: LinearOptions): number {
  const bytes = Math.min(scratch.size, gpu.limits.maxStorageBufferBindingSize);
  const rows = Math.floor(bytes / partialRowBytes(matrix.n, matrix.order));
  invariant(rows >= 1, `the scratch of ${scratch.size} bytes holds a row of ${label}`);
  if (rows < MAX_BATCH) return 1 << Math.floor(Math.log2(rows));
  return Math.min(rows - rows % MAX_BATCH, roundUp(maxRows, MAX_BATCH));
}

/** The uniforms of a layer's dispatches, in one buffer. */
class Uniforms {
  readonly buffer: GPUBuffer;
  readonly #words: Uint32Array<ArrayBuffer>;
  readonly #stride: number;
  readonly #options: LinearOptions;
  #count = 0;

  constructor(options: LinearOptions) {
    const { gpu, matrix, ranges, maxRows, label } = options;
    this.#options = options;
    this.#stride = roundUp(PARAM_BYTES, gpu.limits.minUniformBufferOffsetAlignment);
    const chunks = matrix.order.splits === 1 ? 1 : Math.ceil(maxRows / scratchRows(options));
    const entries = ranges.reduce((sum, range) => sum + (range === "prefill" ? 1 : chunks), 0);
    const bytes = Math.max(1, entries * matrix.blocks.length) * this.#stride;
    this.#words = new Uint32Array(bytes / 4);
    this.buffer = gpu.buffer(
      `${label} uniforms`,
      bytes,
      GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST,
    );
  }

  add(
    block: MatrixBlock,
    at: { row_base: number; row_cap: number; range: RowRange },
  ): GPUBufferBinding {
    const { matrix, input, output } = this.#options;
    const params: Params = {
      n: block.n,
      k: matrix.k,
      x_stride: input.stride,
      x_offset: input.offset,
      y_stride: output.stride,
      y_offset: output.offset + block.start,
      units: matrix.order.units,
      split_units: matrix.order.splitUnits,
      splits: matrix.order.splits,
      row_base: at.row_base,
      row_cap: at.row_cap,
      partial_stride: roundUp(matrix.n, matrix.order.rowBlock),
      range: RANGE_CODES[at.range],
      book_1: firstBlock(matrix, 1, block),
      book_2: firstBlock(matrix, 2, block),
    };
    const offset = this.#stride * this.#count++;
    this.#words.set(PARAM_WORDS.map((word) => params[word]), offset / 4);
    return { buffer: this.buffer, offset, size: PARAM_BYTES };
  }

  upload(gpu: Gpu): void {
    gpu.write(this.buffer, 0, this.#words);
  }
}

/** The row block of a binding block where a member of a stack begins. */
function firstBlock({ members, order }: Matrix, member: number, block: MatrixBlock): number {
  if (member >= members.length) return 0xffffffff;
  return Math.max(0, (members[member].start - block.start) / order.rowBlock);
}

function bindGroup(
  gpu: Gpu,
  label: string,
  bindings: readonly BindingKind[],
  resources: readonly (GPUBuffer | GPUBufferBinding)[],
): GPUBindGroup {
  const bound = gpu.limits.maxStorageBufferBindingSize;
  return gpu.device.createBindGroup({
    label,
    layout: gpu.bindings(bindings),
    entries: resources.map((resource, binding) => {
      if ("buffer" in resource) return { binding, resource };
      const size = bindings[binding] === "uniform" ? STEP_BYTES : Math.min(resource.size, bound);
      return { binding, resource: { buffer: resource, size } };
    }),
  });
}
