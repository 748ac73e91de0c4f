/**
 * Seeded randomness, for everything that must replay.
 *
 * @module
 */

/** A generator of numbers in `[0, 1)`. */
export type Random = () => number;

/**
 * sfc32 (Chris Doty-Humphrey's Small Fast Counter, as in PractRand), seeded from one number.
 *
 * @param seed any safe integer
 *
 * @example
 * ```ts
 * import { seededRandom } from "./random.ts";
 * import { assertEquals } from "@std/assert";
 *
 * const a = seededRandom(7), b = seededRandom(7);
 * assertEquals([a(), a()], [b(), b()]);
 * ```
 */
export function seededRandom(seed: number): Random {
  let a = 0x9e3779b9 | 0, b = seed | 0, c = Math.floor(seed / 2 ** 32) | 0, counter = 1;
  const next = () => {
    const t = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (c << 21) | (c >>> 11);
    c = (c + t) | 0;
    return (t >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 15; i++) next();
  return next;
}

/** A standard normal draw (Box-Muller). */
export function gaussian(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

/** An integer in `[0, below)`. */
export function randomInt(random: Random, below: number): number {
  return Math.floor(random() * below);
}
