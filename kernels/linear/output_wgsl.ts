/**
 * WGSL of what becomes of whole sums, four columns of N at a time: stored in the output, or finished.
 *
 * @module
 */
import type { LinearStore } from "../kernel.ts";
import type { PairFinish } from "./types.ts";
import { putWgsl, times } from "./wgsl.ts";

/** Where whole sums go. */
export interface Output {
  store: LinearStore;
  /** The output can be bound as vectors of 4: strides, offsets and N are multiples of 4. */
  vector: boolean;
  /** Takes whole sums in place of storing them; asks for a `vector` output. */
  finish?: PairFinish;
}

/**
 * Declares the output at this binding, what a finish is bound to behind it, and
 * `put_quad(row, n, value)`: columns `[n, n + 4)` of a row, counted within the view, where `n` is one.
 */
export function outputWgsl({ store, vector, finish }: Output, binding: number): string {
  const put = vector ? putWgsl(store, 4) : /* wgsl */ `${putWgsl(store)}
fn put_quad(row: u32, n: u32, value: vec4<f32>) {
${times(4, (i) => `  if (n + ${i}u < params.n) { put(row, n + ${i}u, value[${i}]); }`)}
}
`;
  return /* wgsl */ `
@group(0) @binding(${binding}) var<storage, read_write> y: array<${vector ? "vec4<f32>" : "f32"}>;
${put}
${finish?.code(binding + 1) ?? ""}`;
}
