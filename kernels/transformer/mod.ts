/**
 * Everything of a transformer layer but its linear layers: embedding, norms, RoPE, attention, SwiGLU.
 *
 * @module
 */
export * from "./attention.ts";
export { tileRows } from "./attention_wgsl.ts";
export * from "./inputs.ts";
export * from "./kv_layout.ts";
export { ropeFinish, swigluFinish } from "./pairs_wgsl.ts";
export * from "./rope_angles.ts";
export * from "./rowwise.ts";
export * from "./step_buffers.ts";
