/**
 * How kernels take codes from their words, and centroids from the storage buffer.
 *
 * @module
 */
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";

/** Centroids of a codebook. */
export function centroidCount({ b }: Pick<CodeGemmFormat, "b">): number {
  return 2 ** b;
}

/** Bits that a code takes in its word. */
export function codeWidth(format: Pick<CodeGemmFormat, "b">): 8 | 16 {
  return codesPerWord(format) === 4 ? 8 : 16;
}

/**
 * WGSL of the code at a place of a word. What a damaged checkpoint has above a code's bits is cut off,
 * so that a centroid is always one of its codebook's.
 *
 * @param word WGSL of a u32
 */
export function codeInWord(format: CodeGemmFormat, word: string, place: number): string {
  const shift = place * codeWidth(format);
  // In the middle of a word: one instruction where a shift and a mask would be two.
  if (shift > 0 && shift + codeWidth(format) < 32) {
    return `extractBits(${word}, ${shift}u, ${format.b}u)`;
  }
  const shifted = shift === 0 ? word : `(${word} >> ${shift}u)`;
  return shift + format.b === 32 ? shifted : `(${shifted} & ${centroidCount(format) - 1}u)`;
}

/** Whether WGSL here has `dot4U8Packed`, for {@linkcode codeIndex}. */
export function hasPackedDot(): boolean {
  // Deno has the set; its types lack it.
  const { wgslLanguageFeatures } = navigator.gpu as { wgslLanguageFeatures?: Set<string> };
  return wgslLanguageFeatures?.has("packed_4x8_integer_dot_product") ?? false;
}

/**
 * WGSL of where the centroid of a code stands in a table that holds every centroid several times side
 * by side: `code * copies + copy`, u32. With 8-bit codes, the dot product of the word's bytes with one
 * byte takes the code out and multiplies it in a single instruction.
 *
 * @param word WGSL of a u32
 * @param place of the code in the word
 * @param copies times that the table holds a centroid
 * @param copy WGSL of the one to take, a u32 below `copies`; not used where there is one
 * @param packed whether {@linkcode hasPackedDot}; the same index either way
 */
export function codeIndex(
  format: CodeGemmFormat,
  word: string,
  place: number,
  copies: number,
  copy: string,
  packed: boolean,
): string {
  if (copies === 1) return codeInWord(format, word, place);
  const oneInstruction = packed && format.b === 8 && copies <= 128;
  return oneInstruction
    ? `(dot4U8Packed(${word}, ${copies * 2 ** (place * 8)}u) + ${copy})`
    : `(${codeInWord(format, word, place)} * ${copies}u + ${copy})`;
}

/**
 * The element of a codebook binding from which lanes gather at random: eight float16 a load, because
 * such a gather costs by the load and not by its bytes.
 */
export const OCTET = "vec4<u32>";

/** Weights of an {@linkcode OCTET}. */
export const OCTET_WEIGHTS = 8;

/** WGSL of four weights of an octet, `vec4<f32>`: exact, as every float16 is a float32. */
export function octetQuad(octet: string, half: number): string {
  const [first, second] = half === 0 ? "xy" : "zw";
  return `vec4<f32>(unpack2x16float(${octet}.${first}), unpack2x16float(${octet}.${second}))`;
}
