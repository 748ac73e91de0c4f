/**
 * Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
 * numbers: as easy as 1, 2, 3" (SC 2011), as `draw.wgsl` has it.
 *
 * @module
 */

type Words4 = [number, number, number, number];

/** The four random words of a counter (four u32) under a key (two u32). */
export function philox4x32(counter: Words4, key: [number, number]): Words4 {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const [high0, low0] = multiply(0xd2511f53, c0);
    const [high1, low1] = multiply(0xcd9e8d57, c2);
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ k0) >>> 0, low1, (high0 ^ c3 ^ k1) >>> 0, low0];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** High and low word of the product of two u32. */
function multiply(a: number, b: number): [high: number, low: number] {
  const low = a * (b & 0xffff), high = a * (b >>> 16) + Math.floor(low / 2 ** 16);
  return [Math.floor(high / 2 ** 16), Math.imul(a, b) >>> 0];
}
