/**
 * A step's sampling over Llama 3's vocabulary, submit and readback included:
 * `deno bench kernels/sampling/sampler_bench.ts`.
 *
 * @module
 */
import type { SamplingParams } from "../../shared/frames.ts";
import { seededRandom } from "../../shared/random.ts";
import { Gpu } from "../gpu.ts";
import { Readback } from "../readback.ts";
import { createSampler } from "./mod.ts";
import { randomRow, sampleRequest } from "./testing.ts";

const VOCAB = 128_256;
const MAX_OUTPUTS = 32;

const WAYS: [name: string, params: Partial<SamplingParams>][] = [
  ["greedy", {}],
  ["temperature", { temperature: 1 }],
  ["top_p", { temperature: 1, topP: 0.9 }],
  ["top_p, 20 alternatives", { temperature: 1, topP: 0.9, alternatives: 20 }],
];

const gpu = await Gpu.open({ software: true });
const buffer = gpu.storage("logits", 4 * VOCAB * MAX_OUTPUTS);
const row = randomRow(seededRandom(1), VOCAB);
for (let i = 0; i < MAX_OUTPUTS; i++) gpu.write(buffer, 4 * VOCAB * i, row);
const logits = { buffer, stride: VOCAB, offset: 0 };
const sampler = await createSampler({ gpu, logits, vocab: VOCAB, maxOutputs: MAX_OUTPUTS });
const readback = await Readback.create(gpu, sampler.maxReadBytes);

for (const outputs of [1, 8, MAX_OUTPUTS]) {
  for (const [name, params] of WAYS) {
    const requests = Array.from({ length: outputs }, (_, i) => sampleRequest(i, params));
    const positions = Uint32Array.from({ length: outputs }, (_, i) => i);
    const shape = { decodeRows: outputs, rows: outputs, outputs, contextTokens: 1 };
    Deno.bench(`${name}, ${outputs} rows`, { group: `${outputs} rows` }, async () => {
      sampler.write(requests, positions);
      const encoder = gpu.device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      sampler.encode(pass, shape);
      pass.end();
      const slot = readback.copy(encoder, sampler.ranges(requests));
      gpu.device.queue.submit([encoder.finish()]);
      sampler.decode(await readback.read(slot), requests);
    });
  }
}
