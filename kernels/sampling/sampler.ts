/**
 * Sampling over the whole vocabulary on the GPU: from logits to tokens, log-probabilities,
 * alternatives and scores.
 *
 * What a row is answered with depends on its own logits, parameters and position, bit for bit, and on
 * nothing else in the batch. See `draw.wgsl` for the draw, `filter.wgsl` for top_p and top_k.
 *
 * @module
 */
import { FleetError, invariant } from "../../shared/errors.ts";
import type { RowRequest, RowResult } from "../../shared/frames.ts";
import { LIMITS } from "../../shared/limits.ts";
import type { Gpu } from "../gpu.ts";
import type { Kernel, RowsView, StepShape } from "../kernel.ts";
import type { ReadRange } from "../readback.ts";
import ADJUST_WGSL from "./adjust.wgsl" with { type: "text" };
import ALTERNATIVES_WGSL from "./alternatives.wgsl" with { type: "text" };
import COMMON_WGSL from "./common.wgsl" with { type: "text" };
import DRAW_WGSL from "./draw.wgsl" with { type: "text" };
import FILTER_WGSL from "./filter.wgsl" with { type: "text" };
import {
  adjustments,
  CHUNK_TOKENS,
  decodeResults,
  draws,
  filters,
  MAX_VOCAB,
  maxAdjustments,
  REQUEST_WORDS,
  RESULT_BYTES,
  STATE_WORDS,
  writeRequest,
} from "./layout.ts";
import SCAN_WGSL from "./scan.wgsl" with { type: "text" };

/** What a sampler is made for. */
export interface SamplerOptions {
  gpu: Gpu;
  /** float32 `(maxOutputs, vocab)`; row i belongs to the step's i-th request. Changed in place. */
  logits: RowsView;
  /** Below 2^19. */
  vocab: number;
  /** Requests of a step at most. */
  maxOutputs: number;
}

/** The buffers by the binding they have in every kernel. */
const BINDINGS = {
  logits: 0,
  requests: 1,
  partials: 2,
  states: 3,
  histograms: 4,
  results: 5,
  adjustments: 6,
  candidates: 7,
} as const;
type Binding = keyof typeof BINDINGS;

/** The dispatches, named like their entry points: one workgroup per `chunk` of each row, per `row`, or per 256 `entries`. */
const STAGES = {
  adjust: { code: ADJUST_WGSL, per: "entries", uses: ["logits", "adjustments"] },
  scan: { code: SCAN_WGSL, per: "chunk", uses: ["logits", "partials"] },
  combine: {
    code: SCAN_WGSL,
    per: "row",
    uses: ["logits", "requests", "partials", "states", "results"],
  },
  histogram: {
    code: FILTER_WGSL,
    per: "chunk",
    uses: ["logits", "requests", "states", "histograms"],
  },
  narrow: { code: FILTER_WGSL, per: "row", uses: ["requests", "states", "histograms"] },
  draw: { code: DRAW_WGSL, per: "chunk", uses: ["logits", "requests", "partials", "states"] },
  pick: {
    code: DRAW_WGSL,
    per: "row",
    uses: ["logits", "requests", "partials", "states", "results"],
  },
  chunk_alternatives: {
    code: ALTERNATIVES_WGSL,
    per: "chunk",
    uses: ["logits", "requests", "candidates"],
  },
  row_alternatives: {
    code: ALTERNATIVES_WGSL,
    per: "row",
    uses: ["requests", "states", "results", "candidates"],
  },
} as const satisfies Record<
  string,
  { code: string; per: "entries" | "chunk" | "row"; uses: readonly Binding[] }
>;
type StageName = keyof typeof STAGES;

const ENTRY_WORKGROUP = 256;
/** Count and padding before the entries. */
const ADJUSTMENTS_HEADER_BYTES = 8;
/** 32 bits, eight a round. */
const FILTER_ROUNDS = 4;

interface BoundStage {
  pipeline: GPUComputePipeline;
  bindGroup: GPUBindGroup;
}

/**
 * Compiles the kernels and makes the buffers.
 *
 * @throws FleetError `gpu` for a vocabulary beyond the bounds
 */
export async function createSampler(options: SamplerOptions): Promise<Sampler> {
  const { gpu, logits, vocab, maxOutputs } = options;
  const rowBytes = 4 * logits.stride;
  if (vocab > MAX_VOCAB || maxOutputs * rowBytes > gpu.limits.maxStorageBufferBindingSize) {
    throw new FleetError(
      "gpu",
      `${maxOutputs} rows of a vocabulary of ${vocab} cannot be sampled on ${gpu.info.name}: at most ` +
        `${MAX_VOCAB} tokens and ${gpu.limits.maxStorageBufferBindingSize} bytes`,
    );
  }
  const chunks = Math.ceil(vocab / CHUNK_TOKENS);
  const entries = maxAdjustments(maxOutputs);
  const buffers: Record<Binding, GPUBuffer> = {
    logits: logits.buffer,
    requests: gpu.storage("sampling requests", maxOutputs * REQUEST_WORDS * 4),
    partials: gpu.storage("sampling partials", maxOutputs * chunks * 16),
    states: gpu.storage("sampling states", maxOutputs * STATE_WORDS * 4),
    histograms: gpu.storage("sampling histograms", maxOutputs * 256 * 16),
    results: gpu.storage("sampling results", maxOutputs * RESULT_BYTES),
    adjustments: gpu.storage("sampling adjustments", ADJUSTMENTS_HEADER_BYTES + 8 * entries),
    candidates: gpu.storage(
      "sampling candidates",
      maxOutputs * chunks * LIMITS.maxAlternatives * 8,
    ),
  };
  const constants = { vocab, stride: logits.stride, offset: logits.offset, chunks };
  const stages = {} as Record<StageName, BoundStage>;
  for (const name of Object.keys(STAGES) as StageName[]) {
    const { code, uses } = STAGES[name];
    const pipeline = await gpu.pipeline({
      label: `sampling ${name}`,
      code: COMMON_WGSL + code,
      entryPoint: name,
      constants,
    });
    const bindGroup = gpu.device.createBindGroup({
      label: `sampling ${name}`,
      layout: pipeline.getBindGroupLayout(0),
      entries: uses.map((use) => ({
        binding: BINDINGS[use],
        resource: { buffer: buffers[use] },
      })),
    });
    stages[name] = { pipeline, bindGroup };
  }
  return new Sampler(options, chunks, buffers, stages);
}

/**
 * The sampler of a model's last stage. For every step: {@linkcode write} its requests, {@linkcode
 * encode}, copy {@linkcode ranges} to a readback, submit; then {@linkcode decode} the bytes.
 */
export class Sampler implements Kernel {
  readonly label = "sampling";
  readonly #gpu: Gpu;
  readonly #logits: RowsView;
  readonly #vocab: number;
  readonly #chunks: number;
  readonly #maxOutputs: number;
  readonly #buffers: Record<Binding, GPUBuffer>;
  readonly #stages: Record<StageName, BoundStage>;
  readonly #requestWords: DataView<ArrayBuffer>;
  readonly #adjustmentWords: DataView<ArrayBuffer>;
  /** What the requests written last need beside the log-sum-exp. */
  #needs = { adjustments: 0, draw: false, filter: false, alternatives: false };

  /** @ignore Use {@linkcode createSampler}. */
  constructor(
    options: SamplerOptions,
    chunks: number,
    buffers: Record<Binding, GPUBuffer>,
    stages: Record<StageName, BoundStage>,
  ) {
    this.#gpu = options.gpu;
    this.#logits = options.logits;
    this.#vocab = options.vocab;
    this.#maxOutputs = options.maxOutputs;
    this.#chunks = chunks;
    this.#buffers = buffers;
    this.#stages = stages;
    this.#requestWords = new DataView(new ArrayBuffer(options.maxOutputs * REQUEST_WORDS * 4));
    this.#adjustmentWords = new DataView(
      new ArrayBuffer(ADJUSTMENTS_HEADER_BYTES + 8 * maxAdjustments(options.maxOutputs)),
    );
  }

  /** Bytes of GPU memory beside the logits. */
  get memoryBytes(): number {
    return Object.entries(this.#buffers)
      .reduce((sum, [name, buffer]) => name === "logits" ? sum : sum + buffer.size, 0);
  }

  /** The most bytes that {@linkcode ranges} may come to: results, and rows of logits up to a frame. */
  get maxReadBytes(): number {
    const rows = Math.min(
      this.#maxOutputs,
      Math.floor(LIMITS.maxFrameBytes / (4 * this.#vocab)),
    );
    return this.#maxOutputs * RESULT_BYTES + rows * 4 * this.#vocab;
  }

  /**
   * Takes the requests of the next step to be encoded and submitted.
   *
   * @param requests in the order of the rows of logits
   * @param rowPosition positions of the step's rows: `rowPosition[request.row]`
   * @throws FleetError `too-large` when bias and penalties name more tokens than a step may, or the
   * rows of logits asked for exceed a frame; `bad-frame` when a token is beyond the vocabulary
   */
  write(requests: RowRequest[], rowPosition: Uint32Array): void {
    invariant(requests.length <= this.#maxOutputs, "requests are bounded by the plan");
    this.#needs = {
      adjustments: this.#packAdjustments(requests),
      draw: requests.some(draws),
      filter: requests.some((request) => filters(request, this.#vocab)),
      alternatives: requests.some((request) =>
        request.type === "sample" && request.sampling.alternatives > 0
      ),
    };
    requests.forEach((request, output) =>
      writeRequest(this.#requestWords, output, request, rowPosition[request.row], this.#vocab)
    );
    const readBytes = this.ranges(requests).reduce((sum, range) => sum + range.bytes, 0);
    if (readBytes > this.maxReadBytes) {
      throw new FleetError("too-large", "The rows of logits asked for do not fit a frame");
    }
    this.#upload("requests", this.#requestWords, requests.length * REQUEST_WORDS * 4);
    if (this.#needs.adjustments > 0) {
      const bytes = ADJUSTMENTS_HEADER_BYTES + 8 * this.#needs.adjustments;
      this.#upload("adjustments", this.#adjustmentWords, bytes);
    }
  }

  /** Adds the dispatches for the requests written last: two when all are greedy. */
  encode(pass: GPUComputePassEncoder, shape: StepShape): void {
    if (shape.outputs === 0) return;
    const { adjustments, draw, filter, alternatives } = this.#needs;
    const run = (name: StageName) => this.#dispatch(pass, name, shape.outputs);
    if (adjustments > 0) run("adjust");
    run("scan");
    run("combine");
    for (let round = 0; filter && round < FILTER_ROUNDS; round++) {
      run("histogram");
      run("narrow");
    }
    if (draw) {
      run("draw");
      run("pick");
    }
    if (alternatives) {
      run("chunk_alternatives");
      run("row_alternatives");
    }
  }

  /** What to read back for these requests: the results, then each whole row that was asked for. */
  ranges(requests: RowRequest[]): ReadRange[] {
    const { buffer, offset, stride } = this.#logits;
    const ranges = [
      { buffer: this.#buffers.results, offset: 0, bytes: requests.length * RESULT_BYTES },
    ];
    requests.forEach((request, output) => {
      if (request.type !== "logits") return;
      ranges.push({ buffer, offset: 4 * (offset + output * stride), bytes: 4 * this.#vocab });
    });
    return ranges;
  }

  /**
   * Results in the order of the requests.
   *
   * @param bytes of {@linkcode ranges}, one behind the other
   * @throws FleetError `gpu` when a row's logits are not finite
   */
  decode(bytes: Uint8Array<ArrayBuffer>, requests: RowRequest[]): RowResult[] {
    return decodeResults(bytes, requests, this.#vocab);
  }

  /** Frees its buffers (the logits are not its own); idempotent. */
  destroy(): void {
    for (const [name, buffer] of Object.entries(this.#buffers)) {
      if (name !== "logits") buffer.destroy();
    }
  }

  #dispatch(pass: GPUComputePassEncoder, name: StageName, outputs: number): void {
    const { pipeline, bindGroup } = this.#stages[name];
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, bindGroup);
    switch (STAGES[name].per) {
      case "entries":
        return pass.dispatchWorkgroups(Math.ceil(this.#needs.adjustments / ENTRY_WORKGROUP));
      case "chunk":
        return pass.dispatchWorkgroups(this.#chunks, outputs);
      case "row":
        return pass.dispatchWorkgroups(outputs);
    }
  }

  /** Packs bias and penalties of all rows; returns how many entries they are. */
  #packAdjustments(requests: RowRequest[]): number {
    const words = this.#adjustmentWords;
    const room = (words.byteLength - ADJUSTMENTS_HEADER_BYTES) / 8;
    let count = 0;
    requests.forEach((request, output) => {
      if (request.type !== "sample") return;
      for (const [token, delta] of adjustments(request.sampling, this.#vocab)) {
        if (count === room) {
          throw new FleetError(
            "too-large",
            `Bias and penalties of a step name more than ${room} tokens; ask for fewer rows at once`,
          );
        }
        const at = ADJUSTMENTS_HEADER_BYTES + 8 * count++;
        words.setUint32(at, output * this.#logits.stride + token, true);
        words.setFloat32(at + 4, delta, true);
      }
    });
    words.setUint32(0, count, true);
    return count;
  }

  #upload(binding: Binding, words: DataView<ArrayBuffer>, bytes: number): void {
    this.#gpu.write(this.#buffers[binding], 0, new Uint8Array(words.buffer, 0, bytes));
  }
}
