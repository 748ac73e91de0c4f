// Row-wise and element-wise steps of a transformer layer, forward and backward, in float32. A kernel
// whose name ends in _back takes the gradient of its output and makes that of its input.

struct Params {
  rows: u32,
  columns: u32,
  extra: u32,
  value: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> in_0: array<f32>;
@group(0) @binding(2) var<storage, read> in_1: array<f32>;
@group(0) @binding(3) var<storage, read> in_2: array<f32>;
@group(0) @binding(4) var<storage, read_write> out_0: array<f32>;
@group(0) @binding(5) var<storage, read_write> out_1: array<f32>;

const LANES = 256u;
const LINE = 32768u;
var<workgroup> sums: array<f32, LANES>;

// The sum over the workgroup, by a fixed tree; every lane gets it.
fn total(lane: u32, value: f32) -> f32 {
  workgroupBarrier();
  sums[lane] = value;
  for (var width = LANES / 2u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (lane < width) {
      sums[lane] += sums[lane + width];
    }
  }
  workgroupBarrier();
  return sums[0];
}

fn largest(lane: u32, value: f32) -> f32 {
  workgroupBarrier();
  sums[lane] = value;
  for (var width = LANES / 2u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (lane < width) {
      sums[lane] = max(sums[lane], sums[lane + width]);
    }
  }
  workgroupBarrier();
  return sums[0];
}

// in_0: x (rows, columns), in_1: weight (columns) -> out_0: normed, out_1: 1 / rms (rows).
// value: epsilon.
@compute @workgroup_size(LANES)
fn norm(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * LINE;
  if (row >= p.rows) {
    return;
  }
  let start = row * p.columns;
  var squares = 0.0;
  for (var i = lane; i < p.columns; i += LANES) {
    squares += in_0[start + i] * in_0[start + i];
  }
  let inverse = 1.0 / sqrt(total(lane, squares) / f32(p.columns) + p.value);
  for (var i = lane; i < p.columns; i += LANES) {
    out_0[start + i] = in_0[start + i] * inverse * in_1[i];
  }
  if (lane == 0u) {
    out_1[row] = inverse;
  }
}

// in_0: x, in_1: weight, in_2: gradient of the output, out_1: 1 / rms, as norm left it
// -> out_0 += gradient of x.
@compute @workgroup_size(LANES)
fn norm_back(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * LINE;
  if (row >= p.rows) {
    return;
  }
  let start = row * p.columns;
  let inverse = out_1[row];
  var dot = 0.0;
  for (var i = lane; i < p.columns; i += LANES) {
    dot += in_2[start + i] * in_1[i] * in_0[start + i];
  }
  let along = total(lane, dot) * inverse * inverse / f32(p.columns);
  for (var i = lane; i < p.columns; i += LANES) {
    out_0[start + i] += inverse * (in_2[start + i] * in_1[i] - in_0[start + i] * along);
  }
}

// in_0: x, in_1: gradient of the output, in_2: 1 / rms -> out_0: the weight's gradient over each
// `extra` rows, (chunks, columns). A thread per column and chunk.
@compute @workgroup_size(LANES)
fn norm_weight_back(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let column = group.x * LANES + lane;
  if (column >= p.columns) {
    return;
  }
  var sum = 0.0;
  let end = min(p.rows, (group.y + 1u) * p.extra);
  for (var row = group.y * p.extra; row < end; row++) {
    sum += in_0[row * p.columns + column] * in_1[row * p.columns + column] * in_2[row];
  }
  out_0[group.y * p.columns + column] = sum;
}

// in_0: scores (rows, columns) -> out_0: probabilities. Rows are positions times `extra` heads; a
// position sees the columns up to its own. in_1 is not read. rows counts those of one sequence.
@compute @workgroup_size(LANES)
fn softmax(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let start = (group.x + group.y * p.rows) * p.columns;
  let seen = group.x / p.extra + 1u;
  var high = -3e38;
  for (var i = lane; i < seen; i += LANES) {
    high = max(high, out_0[start + i]);
  }
  high = largest(lane, high);
  var sum = 0.0;
  for (var i = lane; i < seen; i += LANES) {
    sum += exp(out_0[start + i] - high);
  }
  let inverse = 1.0 / total(lane, sum);
  for (var i = lane; i < p.columns; i += LANES) {
    out_0[start + i] = select(0.0, exp(out_0[start + i] - high) * inverse, i < seen);
  }
}

// in_0: probabilities, out_0: their gradient -> the gradient of the scores, in its place.
@compute @workgroup_size(LANES)
fn softmax_back(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let start = (group.x + group.y * p.rows) * p.columns;
  var dot = 0.0;
  for (var i = lane; i < p.columns; i += LANES) {
    dot += in_0[start + i] * out_0[start + i];
  }
  let along = total(lane, dot);
  for (var i = lane; i < p.columns; i += LANES) {
    out_0[start + i] = in_0[start + i] * (out_0[start + i] - along);
  }
}

// in_0: gate | up (rows, 2 columns) -> out_0: silu(gate) up (rows, columns).
@compute @workgroup_size(LANES)
fn swiglu(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * LANES + lane;
  if (at >= p.rows * p.columns) {
    return;
  }
  let source = (at / p.columns) * 2u * p.columns + at % p.columns;
  let gate = in_0[source];
  out_0[at] = gate / (1.0 + exp(-gate)) * in_0[source + p.columns];
}

// in_0: gate | up, in_1: gradient of the output -> out_0: gradient of gate | up.
@compute @workgroup_size(LANES)
fn swiglu_back(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * LANES + lane;
  if (at >= p.rows * p.columns) {
    return;
  }
  let source = (at / p.columns) * 2u * p.columns + at % p.columns;
  let gate = in_0[source];
  let sigmoid = 1.0 / (1.0 + exp(-gate));
  out_0[source] = in_1[at] * in_0[source + p.columns] * sigmoid * (1.0 + gate * (1.0 - sigmoid));
  out_0[source + p.columns] = in_1[at] * gate * sigmoid;
}

// out_0 (columns) = [out_0 +] sum over rows of in_0 (rows, columns), in order. extra: add to out_0.
@compute @workgroup_size(LANES)
fn reduce(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * LANES + lane;
  if (at >= p.columns) {
    return;
  }
  var sum = 0.0;
  if (p.extra == 1u) {
    sum = out_0[at];
  }
  for (var row = 0u; row < p.rows; row++) {
    sum += in_0[row * p.columns + at];
  }
  out_0[at] = sum;
}

// out_0 = in_0 + value in_1, element by element (columns of them).
@compute @workgroup_size(LANES)
fn add(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * LANES + lane;
  if (at < p.columns) {
    out_0[at] = in_0[at] + p.value * in_1[at];
  }
}

// in_0: output (rows, columns), in_1: what it should be -> out_0: difference, out_1: its square and
// the square of what it should be, summed over each row (rows, 2).
@compute @workgroup_size(LANES)
fn difference(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * LINE;
  if (row >= p.rows) {
    return;
  }
  var error = 0.0;
  var norm = 0.0;
  for (var i = lane; i < p.columns; i += LANES) {
    let at = row * p.columns + i;
    let wanted = in_1[at];
    let by = in_0[at] - wanted;
    out_0[at] = by;
    error += by * by;
    norm += wanted * wanted;
  }
  let all_error = total(lane, error);
  let all_norm = total(lane, norm);
  if (lane == 0u) {
    out_1[2u * row] = all_error;
    out_1[2u * row + 1u] = all_norm;
  }
}

// Distillation (Hinton et al. 2015). in_0: the teacher's logits (rows, columns), in_1: ids of the next
// tokens as floats, negative where there is none; value: the share of the next token in the loss.
// out_0: the student's logits -> their gradient; out_1: divergence and next-token loss (rows, 2).
@compute @workgroup_size(LANES)
fn distill(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * LINE;
  if (row >= p.rows) {
    return;
  }
  let start = row * p.columns;
  var high = -3e38;
  var high_teacher = -3e38;
  for (var i = lane; i < p.columns; i += LANES) {
    high = max(high, out_0[start + i]);
    high_teacher = max(high_teacher, in_0[start + i]);
  }
  high = largest(lane, high);
  high_teacher = largest(lane, high_teacher);
  var sum = 0.0;
  var sum_teacher = 0.0;
  for (var i = lane; i < p.columns; i += LANES) {
    sum += exp(out_0[start + i] - high);
    sum_teacher += exp(in_0[start + i] - high_teacher);
  }
  let log_sum = log(total(lane, sum)) + high;
  let log_sum_teacher = log(total(lane, sum_teacher)) + high_teacher;
  let next = i32(in_1[row]);
  let share = select(p.value, 0.0, next < 0);
  var divergence = 0.0;
  var loss = 0.0;
  for (var i = lane; i < p.columns; i += LANES) {
    let log_student = out_0[start + i] - log_sum;
    let log_teacher = in_0[start + i] - log_sum_teacher;
    let teacher = exp(log_teacher);
    divergence += teacher * (log_teacher - log_student);
    var wanted = (1.0 - share) * teacher;
    if (i32(i) == next) {
      wanted += share;
      loss = -log_student;
    }
    out_0[start + i] = exp(log_student) - wanted;
  }
  let all_divergence = total(lane, divergence);
  let all_loss = total(lane, loss);
  if (lane == 0u) {
    out_1[2u * row] = all_divergence;
    out_1[2u * row + 1u] = all_loss;
  }
}

// in_0: table (vocabulary, columns), in_1: token ids as floats (rows) -> out_0: rows of the table.
@compute @workgroup_size(LANES)
fn embed(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * LANES + lane;
  if (at < p.rows * p.columns) {
    out_0[at] = in_0[u32(in_1[at / p.columns]) * p.columns + at % p.columns];
  }
}

// Products of in_0 and in_1 (columns of them), summed by each of the workgroups: out_0 (workgroups).
@compute @workgroup_size(LANES)
fn dot_product(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  var sum = 0.0;
  for (var i = group.x * LANES + lane; i < p.columns; i += LANES * groups.x) {
    sum += in_0[i] * in_1[i];
  }
  let all = total(lane, sum);
  if (lane == 0u) {
    out_0[group.x] = all;
  }
}

// out_0 (rows, columns), rows of a square matrix from row `extra` on: value times the mean of its
// diagonal in these rows is added to the diagonal. One workgroup.
@compute @workgroup_size(LANES)
fn damp(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var i = lane; i < p.rows; i += LANES) {
    sum += out_0[i * p.columns + p.extra + i];
  }
  let by = p.value * total(lane, sum) / f32(p.rows);
  for (var i = lane; i < p.rows; i += LANES) {
    out_0[i * p.columns + p.extra + i] += by;
  }
}
