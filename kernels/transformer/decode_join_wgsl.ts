/**
 * WGSL of attention for decode rows, second half: the splits of a row's context joined.
 *
 * @module
 */
import { times } from "./attention_wgsl.ts";
import { type BatchPlace, batchWgsl } from "./decode_attention_wgsl.ts";
import { SPLIT_TOKENS } from "./decode_tiling.ts";
import { transformerWgsl } from "./inputs.ts";
import type { HeadShape } from "./kv_layout.ts";

const LANES = 128;
/** Splits of a lane that are under way together. */
const AHEAD = 4;

/** Parts of the splits that a workgroup takes side by side, a lane of each per 4 dimensions. */
function joinParts(quads: number): number {
  return Math.min(8, 2 ** Math.floor(Math.log2(LANES / quads)));
}

/**
 * The kernel's code; dispatched over (heads, rows). Each part takes every so many splits, in order,
 * with a running softmax (Milakov and Gimelshein 2018); then the parts are joined, in order. Splits are
 * asked for without regard to how many the row says there are, so that the first ones do not wait for
 * it; what lies past the last one is left out. All turns share one piece of code, which a layer waits
 * for as it does for data.
 */
export function decodeJoinWgsl(shape: HeadShape, place: BatchPlace): string {
  const quads = shape.paddedDim / 4;
  const parts = joinParts(quads);
  const whole = shape.headDim % 4 === 0;
  return transformerWgsl(/* wgsl */ `
const HEADS = ${shape.heads}u;
const HEAD_DIM = ${shape.headDim}u;
const QUADS = ${quads}u;
const PARTS = ${parts}u;
const LOWEST = -3.0e38f;
const SPLIT = ${SPLIT_TOKENS}u;

@group(0) @binding(0) var<storage, read> rows: array<Row>;
// (splits, rows of the batch, HEADS, 1 + QUADS), as the splits leave them.
@group(0) @binding(1) var<storage, read> partials: array<vec4<f32>>;
// (rows, HEADS, HEAD_DIM)
@group(0) @binding(2) var<storage, read_write> attended: array<${whole ? "vec4<f16>" : "f16"}>;
${batchWgsl(place, 3)}
var<workgroup> part_softmax: array<vec2<f32>, PARTS>; // maximum and sum
var<workgroup> part_weighted: array<array<vec4<f32>, QUADS>, PARTS>;

@compute @workgroup_size(${quads * parts})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) workgroups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let head = workgroup.x;
  let quad = lane % QUADS;
  let part = lane / QUADS;
  let row = batch_first_row() + workgroup.y;
  let splits = rows[row].position / SPLIT + 1u;
  let stride = workgroups.y * HEADS * (1u + QUADS);
  let base = (workgroup.y * HEADS + head) * (1u + QUADS);
  var maximum = LOWEST;
  var sum = 0.0;
  var weighted = vec4<f32>();
  var split = part;
  loop {
    ${
    times(AHEAD, (u) =>
      `let at${u} = base + (split + ${u}u * PARTS) * stride;
    let softmax${u} = partials[at${u}].xy;
    let value${u} = partials[at${u} + 1u + quad];`)
  }
    ${times(AHEAD, (u) => `let there${u} = split + ${u}u * PARTS < splits;`)}
    var raised = maximum;
    ${times(AHEAD, (u) => `raised = max(raised, select(LOWEST, softmax${u}.x, there${u}));`)}
    let shrink = exp(maximum - raised);
    maximum = raised;
    sum *= shrink;
    weighted *= shrink;
    ${
    times(AHEAD, (u) =>
      `if (there${u}) {
      let share = exp(softmax${u}.x - raised);
      sum += share * softmax${u}.y;
      weighted += share * value${u};
    }`)
  }
    split += ${AHEAD}u * PARTS;
    if (split - part >= splits) {
      break;
    }
  }
  if (quad == 0u) {
    part_softmax[part] = vec2<f32>(maximum, sum);
  }
  part_weighted[part][quad] = weighted;
  workgroupBarrier();
  if (part > 0u) {
    return;
  }
  ${times(parts, (p) => `let softmax${p} = part_softmax[${p}];`)}
  var highest = softmax0.x;
  ${times(parts - 1, (p) => `highest = max(highest, softmax${p + 1}.x);`)}
  var total = 0.0;
  var joined = vec4<f32>();
  ${
    times(parts, (p) =>
      `{
    let share = exp(softmax${p}.x - highest);
    total += share * softmax${p}.y;
    joined += share * part_weighted[${p}][quad];
  }`)
  }
  let result = joined * (1.0 / total);
  ${
    whole
      ? "attended[(row * HEADS + head) * QUADS + quad] = to_f16x4(result);"
      : `let target_head = (row * HEADS + head) * HEAD_DIM;
  for (var i = 0u; i < 4u; i++) {
    if (quad * 4u + i < HEAD_DIM) {
      attended[target_head + quad * 4u + i] = to_f16(result[i]);
    }
  }`
  }
}
`);
}
