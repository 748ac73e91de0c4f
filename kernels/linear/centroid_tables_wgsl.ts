/**
 * WGSL of the codebooks in workgroup memory, for decode kernels whose codes gather their centroids: a
 * table for each codebook and each four elements of a vector, every centroid in several copies side by
 * side, lanes spread over the copies, so that they seldom meet in a bank.
 *
 * @module
 */
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";
import { codeIndex } from "./code_words_wgsl.ts";
import { wordOf } from "./thread_rows_wgsl.ts";
import { times } from "./wgsl.ts";
import { shareThreads, type WorkgroupShare } from "./workgroup_share.ts";

/** What of a kernel decides its tables. */
export interface CentroidTables extends Pick<WorkgroupShare, "splits" | "lanes"> {
  /** 8-bit codes of vectors of a multiple of 4. */
  format: CodeGemmFormat;
  /** How often each centroid stands in workgroup memory, a power of two. */
  copies: number;
  /** WGSL has packed dot products. */
  packed: boolean;
}

/** Declares the tables. @param entry the WGSL type of four elements of a centroid */
export function tablesWgsl({ format: { m, v }, copies }: CentroidTables, entry: string): string {
  return times(
    m * v / 4,
    (t) => `var<workgroup> ${tableName(v, t)}: array<${entry}, ${256 * copies}>;`,
  );
}

const tableName = (v: number, t: number) => `table${Math.floor(t / (v / 4))}_${t % (v / 4)}`;

/**
 * Fills the tables from `codebooks[]`, those of the workgroup's matrix `book`: neighbouring lanes write
 * different copies at a time. A barrier must follow.
 *
 * @param stored WGSL of what a table holds of four elements, given WGSL of these
 */
export function fillTablesWgsl(
  kernel: CentroidTables,
  stored = (centroid: string) => centroid,
): string {
  const { format: { m, v }, copies } = kernel;
  const quads = v / 4;
  return `  for (var entry = lane; entry < 256u; entry += ${shareThreads(kernel)}u) {
${
    times(m * quads, (t) =>
      `    let centroid${t} = codebooks[((book * ${m}u + ${
        Math.floor(t / quads)
      }u) * 256u + entry) * ${quads}u + ${t % quads}u];`)
  }
${
    times(copies, (c) =>
      `    { let at = entry * ${copies}u + ((lane + ${c}u) & ${copies - 1}u);
${times(m * quads, (t) => `${tableName(v, t)}[at] = ${stored(`centroid${t}`)};`)} }`)
  }
  }`;
}

/**
 * Gathers the centroids of `count` fours of K from the turn's `first` on, of row `r`; the lane's copy is
 * `copy`.
 *
 * @param put statements that take a four, `i` of them in, given WGSL of what each codebook has for it
 */
export function gatherWgsl(
  kernel: CentroidTables,
  first: number,
  count: number,
  r: number,
  put: (i: number, centroids: string[]) => string,
): string {
  const { format, copies, packed } = kernel;
  const { m, v } = format;
  const quads = v / 4;
  const start = Math.floor(first / quads);
  const positions = Math.floor((first + count - 1) / quads) - start + 1;
  const at = (position: number, k: number) => `at${r}_${position}_${k}`;
  const places = times(positions * m, (i) => {
    const [position, k] = [Math.floor(i / m), i % m];
    const word = wordOf(kernel, start + position, k, r);
    const place = (start + position) % codesPerWord(format);
    return `let ${at(position, k)} = ${codeIndex(format, word, place, copies, "copy", packed)};`;
  });
  const centroids = times(count, (i) => {
    const position = Math.floor((first + i) / quads) - start;
    const quad = (first + i) % quads;
    return put(
      i,
      Array.from({ length: m }, (_, k) => `${tableName(v, k * quads + quad)}[${at(position, k)}]`),
    );
  });
  return `${places}\n${centroids}`;
}
