/**
 * WGSL that puts the partial sums of a linear layer together: the splits of a slice one after the
 * other, then the slices one after the other, and stores or finishes the result.
 *
 * A thread sums a slice of four columns of N, or of four pairs of them. Its time is that of its
 * trips to memory, so loads are vectors and all under way before the first is added.
 *
 * @module
 */
import { type Output, outputWgsl } from "./output_wgsl.ts";
import { HEADER_WGSL, times } from "./wgsl.ts";

const THREADS = 256;
/** Splits whose loads are under way together: more would want too many registers. */
const LOADS = 8;
const OUTPUT_BINDING = 3;

/** Step, params, partial sums, output; those of a finish come behind them. */
export const REDUCE_BINDINGS = ["uniform", "uniform", "read", "write"] as const;

/** How many partial sums an output has, and in how many runs they are summed. */
export interface ReduceOrder {
  splits: number;
  slices: number;
}

/** Columns of N of a workgroup. */
export function reduceColumns({ slices }: Pick<ReduceOrder, "slices">, { finish }: Output): number {
  return THREADS / slices * 4 * (finish ? 2 : 1);
}

/** The kernel's code; dispatched over (columns of N, rows). */
export function reduceWgsl({ splits, slices }: ReduceOrder, output: Output): string {
  const { finish } = output;
  const quads = THREADS / slices;
  const perSlice = Math.ceil(splits / slices);
  const usedSlices = Math.ceil(splits / perSlice);
  // Column 0 of a thread's pairs, and column 1 where there are pairs.
  const columns = finish ? [0, 1] : [0];
  const each = (make: (column: number) => string) => columns.map(make).join("\n");
  const halfQuads = finish ? finish.half / 4 : 0;
  const load = (split: number, column: number) =>
    `partial[at + ${split}u * split_stride + ${column * halfQuads}u]`;
  // The last slices may be short, or empty.
  const part = (split: number, column: number) =>
    (slices - 1) * perSlice + split < splits
      ? `part${split}_${column}`
      : `select(vec4<f32>(), part${split}_${column}, slice * ${perSlice}u + ${split}u < ${splits}u)`;
  const run = (from: number) => {
    const count = Math.min(LOADS, perSlice - from);
    return times(count, (i) => each((c) => `  let part${from + i}_${c} = ${load(from + i, c)};`)) +
      "\n" +
      times(count, (i) => each((c) => `  sum${c} += ${part(from + i, c)};`));
  };
  return /* wgsl */ `${HEADER_WGSL}
@group(0) @binding(2) var<storage, read> partial: array<vec4<f32>>;
${outputWgsl(output, OUTPUT_BINDING)}
${
    slices === 1
      ? ""
      : `var<workgroup> sums: array<array<vec4<f32>, ${quads}>, ${slices * columns.length}>;`
  }

@compute @workgroup_size(${THREADS})
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) workgroup: vec3<u32>,
) {
  let slice = lane / ${quads}u;
  let own = lane % ${quads}u;
  let place = workgroup.x * ${quads}u + own;
  let quad = ${
    finish ? `place / ${halfQuads}u * ${2 * halfQuads}u + place % ${halfQuads}u` : "place"
  };
  let row_stride = params.partial_stride / 4u;
  let split_stride = params.row_cap * row_stride;
  // What lies past the last column or split is read by some, and added to no output.
  let at = slice * ${perSlice}u * split_stride + workgroup.y * row_stride + quad;
${each((c) => `  var sum${c} = vec4<f32>();`)}
${times(Math.ceil(perSlice / LOADS), (i) => run(i * LOADS))}
${
    slices === 1 ? "" : `
${each((c) => `  sums[slice * ${columns.length}u + ${c}u][own] = sum${c};`)}
  workgroupBarrier();
  if (slice != 0u) { return; }
${
      times(
        usedSlices - 1,
        (i) => each((c) => `  sum${c} += sums[${(i + 1) * columns.length + c}u][own];`),
      )
    }
`
  }
  let row = params.row_base + workgroup.y;
  let n = quad * 4u;
  if (n < params.n && row < range_rows()) {
    ${
    finish ? "finish(range_start() + row, n, sum0, sum1)" : "put_quad(range_start() + row, n, sum0)"
  };
  }
}
`;
}
