/**
 * Frames as bytes.
 *
 * @module
 */
export { decodeFrame } from "./frame_decoder.ts";
export { encodeFrame } from "./frame_encoder.ts";
export { resultFrameBytes, stepFrameBytes, type StepFrameShape } from "./frame_layout.ts";
