import { assertEquals } from "@std/assert";
import { codeIndex } from "./code_words_wgsl.ts";

/** What WGSL's `dot4U8Packed` gives: the sum of the products of bytes of equal place. */
function dot4U8Packed(a: number, b: number): number {
  return [0, 8, 16, 24].reduce((sum, at) => sum + ((a >>> at) & 255) * ((b >>> at) & 255), 0);
}

/** What WGSL's `extractBits` gives. */
function extractBits(word: number, offset: number, count: number): number {
  return (word >>> offset) & (2 ** count - 1);
}

/** Computes an expression of {@linkcode codeIndex} in JavaScript: only its literals differ. */
function evaluate(expression: string, word: number, copy: number): number {
  const script = expression.replaceAll(/(\d)u/g, "$1").replaceAll(">>", ">>>");
  const names = ["dot4U8Packed", "extractBits", "word", "copy"];
  return new Function(...names, `return ${script}`)(dot4U8Packed, extractBits, word, copy);
}

Deno.test("A code's place in a table of copies is the same with and without the packed dot product", () => {
  for (const copies of [1, 2, 4, 16, 128]) {
    for (const word of [0, 0xffffffff, 0x80ff0102, 0x12345678]) {
      for (const b of [5, 8, 12, 16]) {
        const format = { m: 1, v: 4, b, g: 128 };
        for (let place = 0; place < (b > 8 ? 2 : 4); place++) {
          const code = (word >>> (place * (b > 8 ? 16 : 8))) & (2 ** b - 1);
          const copy = copies - 1;
          for (const packed of [false, true]) {
            const index = codeIndex(format, "word", place, copies, "copy", packed);
            assertEquals(evaluate(index, word, copy), code * copies + copy, index);
          }
        }
      }
    }
  }
});
