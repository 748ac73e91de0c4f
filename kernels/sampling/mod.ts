/**
 * Sampling over the whole vocabulary.
 *
 * @module
 */
export { createSampler, type Sampler, type SamplerOptions } from "./sampler.ts";
