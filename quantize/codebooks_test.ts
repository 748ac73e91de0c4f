import { assertAlmostEquals, assertEquals } from "@std/assert";
import { gaussian, seededRandom } from "../shared/random.ts";
import { decodeGroups, encodeGroups, startCodebooks, trainCodebooks } from "./codebooks.ts";
import { parseFormat } from "./format.ts";

const ROUNDS = { rounds: 2 };

function weights(count: number): Float32Array<ArrayBuffer> {
  const random = seededRandom(3);
  return Float32Array.from({ length: count }, () => gaussian(random));
}

Deno.test("codebooks to begin with stand for parts of the vector, and lose what vectors of that size lose", () => {
  const sample = weights(2 ** 12), all = weights(2 ** 13);
  for (const [whole, part] of [["m2v8g32", "m1v4g32"], ["m2v4g32", "m1v2g32"]]) {
    const format = parseFormat(whole), small = parseFormat(part);
    const books = startCodebooks(sample, format, ROUNDS, seededRandom(1));
    const centroids = trainCodebooks(sample, small, ROUNDS, seededRandom(1));
    for (const [at, value] of books.entries()) {
      const book = Math.floor(at / (256 * format.v)), d = at % format.v - book * small.v;
      const centroid = Math.floor(at / format.v) % 256;
      const inside = d >= 0 && d < small.v;
      assertEquals(value, inside ? centroids[centroid * small.v + d] : 0);
    }
    const error = (codebooks: Float32Array, of: typeof format) => {
      const decoded = decodeGroups(encodeGroups(all, codebooks, of), codebooks, of);
      return all.reduce((sum, weight, i) => sum + (weight - decoded[i]) ** 2, 0);
    };
    const [ours, theirs] = [error(books, format), error(centroids, small)];
    assertAlmostEquals(ours, theirs, 1e-3 * theirs);
  }
});

Deno.test("codebooks whose number does not divide the vector begin as k-means trains them", () => {
  const sample = weights(2 ** 11), format = parseFormat("m3v4g32");
  assertEquals(
    startCodebooks(sample, format, ROUNDS, seededRandom(1)),
    trainCodebooks(sample, format, ROUNDS, seededRandom(1)),
  );
});
