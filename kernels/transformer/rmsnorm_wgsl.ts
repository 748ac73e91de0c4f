/**
 * WGSL of RMSNorm (Zhang and Sennrich 2019): residual float32 -> float16.
 *
 * At a row or a few the kernel's time is its chain of waits, so it has one wait for memory and two for
 * a barrier. A row is shared by several workgroups: each sums the squares of the whole row, which is
 * in the cache, and writes its own columns, whose values and gains it asks for at the same time.
 *
 * The order of the sum is fixed by the hidden size alone: {@linkcode LANES} lanes on every adapter,
 * each over the same columns in every workgroup, then sums of eight and of thirty-two.
 *
 * @module
 */
import { transformerWgsl } from "./inputs.ts";

const LANES = 256;
/** Lanes whose sums are added first. */
const PER_GROUP = 8;
const GROUPS = LANES / PER_GROUP;
/** Units of columns that a lane writes. */
const OWN = 2;

/** Columns that are read and written together: rows of other sizes would begin between two units. */
const unitColumns = (hidden: number) => hidden % 4 === 0 ? 4 : 1;

/** Workgroups of a row. */
export function normShares(hidden: number): number {
  return Math.ceil(hidden / unitColumns(hidden) / (OWN * LANES));
}

/**
 * The kernel's code; dispatched over ({@linkcode normShares}, rows or outputs).
 *
 * @param gather the rows that have a request, one per output; else all rows
 */
export function rmsnormWgsl(hidden: number, epsilon: number, gather: boolean): string {
  const vector = unitColumns(hidden) === 4;
  const [unit, stored, toF16] = vector
    ? ["vec4<f32>", "vec4<f16>", "to_f16x4"]
    : ["f32", "f16", "to_f16"];
  const units = hidden / unitColumns(hidden);
  const each = (count: number, line: (i: number) => string) =>
    Array.from({ length: count }, (_, i) => line(i)).join("\n  ");
  const perLane = Math.ceil(units / LANES);
  const inRow = (i: number) => (i + 1) * LANES <= units;
  const ownWhole = units % (OWN * LANES) === 0;
  const own = (i: number) => `own + ${i * LANES}u`;
  const sum8 = (term: (i: number) => string) =>
    `((${term(0)} + ${term(1)}) + (${term(2)} + ${term(3)})) + ` +
    `((${term(4)} + ${term(5)}) + (${term(6)} + ${term(7)}))`;
  return transformerWgsl(/* wgsl */ `
const UNITS = ${units}u;
const LAST = UNITS - 1u;

@group(0) @binding(0) var<storage, read> residual: array<${unit}>; // (rows, UNITS)
@group(0) @binding(1) var<storage, read> weight: array<${unit}>; // (UNITS)
@group(0) @binding(2) var<storage, read_write> normed: array<${stored}>; // (rows or outputs, UNITS)
${gather ? "@group(0) @binding(3) var<storage, read> output_rows: array<u32>;" : ""}

var<workgroup> lane_sums: array<array<f32, ${PER_GROUP}>, ${GROUPS}>;
var<workgroup> group_sums: array<vec4<f32>, ${GROUPS / 4}>;

@compute @workgroup_size(${LANES})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = ${gather ? "output_rows[workgroup.y]" : "workgroup.y"} * UNITS;
  let own = workgroup.x * ${OWN * LANES}u + lane;
  ${
    each(
      perLane,
      (i) =>
        `let value${i} = residual[row + ${
          inRow(i) ? `lane + ${i * LANES}u` : `min(lane + ${i * LANES}u, LAST)`
        }];`,
    )
  }
  ${
    each(OWN, (i) => {
      const at = ownWhole ? own(i) : `min(${own(i)}, LAST)`;
      return `let own${i} = residual[row + ${at}]; let gain${i} = weight[${at}];`;
    })
  }
  var squares = ${unit}();
  ${
    each(perLane, (i) =>
      inRow(i)
        ? `squares += value${i} * value${i};`
        : `squares += select(${unit}(), value${i} * value${i}, lane + ${i * LANES}u <= LAST);`)
  }
  lane_sums[lane / ${PER_GROUP}u][lane % ${PER_GROUP}u] = ${
    vector ? "(squares.x + squares.y) + (squares.z + squares.w)" : "squares"
  };
  workgroupBarrier();
  if (lane < ${GROUPS}u) {
    group_sums[lane / 4u][lane % 4u] = ${sum8((i) => `lane_sums[lane][${i}]`)};
  }
  workgroupBarrier();
  let sums = ${sum8((i) => `group_sums[${i}]`)};
  let mean = ((sums.x + sums.y) + (sums.z + sums.w)) / ${hidden}.0;
  let scale = 1.0 / sqrt(mean + ${epsilon.toExponential()});
  ${
    each(OWN, (i) => {
      const store = `normed[workgroup.y * UNITS + ${
        own(i)
      }] = ${toF16}(own${i} * scale * gain${i});`;
      return ownWhole ? store : `if (${own(i)} <= LAST) { ${store} }`;
    })
  }
}
`);
}
