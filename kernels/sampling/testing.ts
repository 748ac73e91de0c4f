/**
 * A sampler whose logits a test writes, and requests to give it.
 *
 * @module
 */
import {
  GREEDY,
  type RowRequest,
  type RowResult,
  type SamplingParams,
} from "../../shared/frames.ts";
import { gaussian, type Random } from "../../shared/random.ts";
import { Gpu, type GpuOptions } from "../gpu.ts";
import { createSampler } from "./sampler.ts";

/** Greedy parameters, but for what is said. */
export function sampling(params: Partial<SamplingParams>): SamplingParams {
  return { ...GREEDY, ...params };
}

/** A `sample` request; greedy, but for what is said. */
export function sampleRequest(row: number, params: Partial<SamplingParams>): RowRequest {
  return { type: "sample", row, sampling: sampling(params) };
}

/** A row of normally distributed logits. */
export function randomRow(random: Random, vocab: number, spread = 3): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: vocab }, () => spread * gaussian(random));
}

/** A sampler on its own GPU; row i of the batch is the row of request i. */
export interface SamplerHarness {
  answer(
    rows: Float32Array<ArrayBuffer>[],
    requests: RowRequest[],
    positions: number[],
  ): Promise<RowResult[]>;
  close(): void;
}

/** Opens a GPU and makes a sampler whose rows are neither packed nor at the buffer's start. */
export async function openSampler(
  vocab: number,
  maxOutputs: number,
  limits: GpuOptions["limits"] = "adapter",
): Promise<SamplerHarness> {
  const gpu = await Gpu.open({ software: true, limits });
  const stride = vocab + 3, offset = 5;
  const buffer = gpu.storage("logits", 4 * (offset + stride * maxOutputs));
  const sampler = await createSampler({
    gpu,
    logits: { buffer, stride, offset },
    vocab,
    maxOutputs,
  });
  return {
    async answer(rows, requests, positions) {
      const outputs = requests.length;
      rows.forEach((row, i) => gpu.write(buffer, 4 * (offset + i * stride), row));
      sampler.write(requests, Uint32Array.from(positions));
      const encoder = gpu.device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      sampler.encode(pass, { decodeRows: outputs, rows: outputs, outputs, contextTokens: 1 });
      pass.end();
      gpu.device.queue.submit([encoder.finish()]);
      const parts: Uint8Array[] = [];
      for (const range of sampler.ranges(requests)) {
        parts.push(new Uint8Array(await gpu.read(range.buffer, range.bytes, range.offset)));
      }
      return sampler.decode(
        new Uint8Array(await new Blob(parts as BlobPart[]).arrayBuffer()),
        requests,
      );
    },
    close() {
      sampler.destroy();
      gpu.close();
    },
  };
}
