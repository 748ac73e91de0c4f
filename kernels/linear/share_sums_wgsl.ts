/**
 * WGSL of how sums leave the decode kernels of 8-bit codes that are dequantized or integers: those of a
 * split go to the scratch; where a workgroup has all splits, they meet in workgroup memory and are
 * stored or finished.
 *
 * @module
 */
import type { Output } from "./output_wgsl.ts";
import type { PairFinish } from "./types.ts";
import { times } from "./wgsl.ts";
import { holdsWholeSums, shareColumns, type WorkgroupShare } from "./workgroup_share.ts";

/** The sums of each split of a workgroup, by fours of N, where they meet. */
export function sumsWgsl(kernel: WorkgroupShare): string {
  return meets(kernel)
    ? `var<workgroup> sums: array<array<${sumType(kernel)}, ${
      workgroupQuads(kernel)
    }>, ${kernel.splits}>;`
    : "";
}

/** Statements behind the last product, whose sums are in `acc<row of N>_<place in the batch>`. */
export function leaveWgsl(kernel: WorkgroupShare, target: Output | "partial"): string {
  if (!meets(kernel)) return storeSums(kernel, target);
  if (target === "partial" || target.finish === undefined) return addSplits(kernel, target);
  return finishPairs(kernel, target.finish);
}

/** Whether there is anything to put together within a workgroup. */
function meets(kernel: WorkgroupShare): boolean {
  return holdsWholeSums(kernel) && kernel.splits > 1;
}

const workgroupQuads = (kernel: WorkgroupShare) => shareColumns(kernel) / 4;

/** Row quad `t` of a thread for place `b` of the batch. */
function quadSum(t: number, b: number): string {
  return `vec4<f32>(${[0, 1, 2, 3].map((r) => `acc${4 * t + r}_${b}`).join(", ")})`;
}

/** A split's sums: partial ones, padded rows of N included, or whole ones where K is one split. */
function storeSums(kernel: WorkgroupShare, target: Output | "partial"): string {
  const { batch, rowsPerThread, lanes } = kernel;
  return times(batch, (b) =>
    times(
      rowsPerThread / 4,
      (t) =>
        `  if (first + ${b}u < rows && quad + ${t * lanes}u + lane % ${lanes}u < quads) {
    ${store(target, b, "split", `quad${t}`, quadSum(t, b))}
  }`,
    ));
}

/** What meets of four rows of N in a round. */
const sumType = ({ sumRounds }: WorkgroupShare) => `vec${4 / sumRounds}<f32>`;

/**
 * Rounds in which the sums of all splits for place `b` of the batch meet in workgroup memory, each
 * followed by `add`, which adds them up.
 */
function meet(kernel: WorkgroupShare, b: number, add: (round: number) => string): string {
  const { rowsPerThread, lanes, sumRounds } = kernel;
  return times(sumRounds, (round) => {
    const part = sumRounds === 1 ? "" : `.${["xy", "zw"][round]}`;
    return `${b > 0 || round > 0 ? "  workgroupBarrier();" : ""}
${
      times(
        rowsPerThread / 4,
        (t) =>
          `  sums[lane / ${lanes}u][${t * lanes}u + lane % ${lanes}u] = ${quadSum(t, b)}${part};`,
      )
    }
  workgroupBarrier();
${add(round)}`;
  });
}

/**
 * Adds what met in a round of the splits of the workgroup's quad `at` to `total`, which begins as
 * zeros, as the order says.
 */
function addTo(total: string, at: string, kernel: WorkgroupShare, round: number): string {
  const { order, sumRounds } = kernel;
  const { splits, slices } = order.dequantize;
  const perSlice = Math.ceil(splits / slices);
  const whole = ["vec4<f32>(sum, vec2<f32>())", "vec4<f32>(vec2<f32>(), sum)"];
  return times(slices, (s) => {
    const from = s * perSlice;
    const count = Math.max(0, Math.min(perSlice, splits - from));
    return `{ var sum = ${sumType(kernel)}();
${times(count, (i) => `sum += sums[${from + i}][${at}];`)}
${total} += ${sumRounds === 1 ? "sum" : whole[round]}; }`;
  });
}

/** Whole sums, stored, or left in the scratch for what finishes them: a quad for each thread at most. */
function addSplits(kernel: WorkgroupShare, target: Output | "partial"): string {
  return `  let adds = lane < min(${workgroupQuads(kernel)}u, quads - quad);
${
    times(kernel.batch, (b) =>
      `  var total${b} = vec4<f32>();
${meet(kernel, b, (round) => `  if (adds) {\n${addTo(`total${b}`, "lane", kernel, round)}\n  }`)}
  if (adds && first + ${b}u < rows) {
    ${store(target, b, "0u", "(quad + lane)", `total${b}`)}
  }`)
  }`;
}

/**
 * Whole sums, finished. Each row of the batch has threads of its own: what a finish reads is waited for
 * once.
 */
function finishPairs(kernel: WorkgroupShare, { half }: PairFinish): string {
  const { batch } = kernel;
  const pairQuads = workgroupQuads(kernel) / 2;
  const halfQuads = half / 4;
  return `  let place = lane / ${pairQuads}u;
  let pair_quad = lane % ${pairQuads}u;
  let own = pair_quad / ${halfQuads}u * ${2 * halfQuads}u + pair_quad % ${halfQuads}u;
  var total0 = vec4<f32>();
  var total1 = vec4<f32>();
${
    times(batch, (b) =>
      meet(kernel, b, (round) =>
        `  if (place == ${b}u) {
${addTo("total0", "own", kernel, round)}
${addTo("total1", `own + ${halfQuads}u`, kernel, round)}
  }`))
  }
  let n = (quad + own) * 4u;
  if (place < ${batch}u && first + place < rows && n < params.n) {
    finish(range_start() + first + place, n, total0, total1);
  }`;
}

/** Stores the sums of four rows of N. */
function store(
  target: Output | "partial",
  b: number,
  split: string,
  quad: string,
  value: string,
): string {
  return target === "partial"
    ? `y[(${split} * params.row_cap + first - params.row_base + ${b}u) * params.partial_stride / 4u + ${quad}] = ${value};`
    : `if (${quad} * 4u < params.n) { put_quad(range_start() + first + ${b}u, ${quad} * 4u, ${value}); }`;
}
