// Codebook matrices: W[n, i v + d] = scale[n, i v / g] * sum_j codebook[j, code[n, i, j], d], with
// codes one to a word, (N, K / v, m), codebooks (m, 256, v) and scales (N, K / g) in float32.
// Dequantization, gradients of scales and codebooks, and the search for codes.

struct Params {
  n: u32,
  k: u32,
  m: u32,
  v: u32,
  g: u32,
  extra: u32, // vectors a chunk, first column of a block, first row in W: see the kernel
  columns: u32, // of a block of the search
  passes: u32, // of the search over the codebooks of a vector
  origin: u32, // first row of the Hessian that is bound
  unused_0: u32,
  unused_1: u32,
  unused_2: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> codes: array<u32>;
@group(0) @binding(2) var<storage, read> codebooks: array<f32>;
@group(0) @binding(3) var<storage, read> scales: array<f32>;
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;
@group(0) @binding(5) var<storage, read> gradient: array<f32>;
@group(0) @binding(6) var<storage, read> hessian: array<f32>;
@group(0) @binding(7) var<storage, read_write> result: array<f32>;

const LINE = 32768u;
const SIZE = 256u;

// weights (N, K), from row `extra` of the buffer on. A thread per vector.
@compute @workgroup_size(256)
fn dequantize(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let vector = (group.x + group.y * LINE) * 256u + lane;
  if (vector >= p.n * p.k / p.v) {
    return;
  }
  let scale = scales[vector * p.v / p.g];
  for (var d = 0u; d < p.v; d++) {
    var sum = 0.0;
    for (var j = 0u; j < p.m; j++) {
      sum += codebooks[(j * SIZE + codes[vector * p.m + j]) * p.v + d];
    }
    weights[p.extra * p.k + vector * p.v + d] = scale * sum;
  }
}

// Gradient of each scale: that of its weights along what the scale multiplies. A thread per scale.
@compute @workgroup_size(256)
fn scales_back(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let at = (group.x + group.y * LINE) * 256u + lane;
  if (at >= p.n * p.k / p.g) {
    return;
  }
  var sum = 0.0;
  for (var i = 0u; i < p.g; i += p.v) {
    let vector = (at * p.g + i) / p.v;
    for (var d = 0u; d < p.v; d++) {
      var direction = 0.0;
      for (var j = 0u; j < p.m; j++) {
        direction += codebooks[(j * SIZE + codes[vector * p.m + j]) * p.v + d];
      }
      sum += direction * gradient[p.extra * p.k + at * p.g + i + d];
    }
  }
  result[at] = sum;
}

// Gradient of a codebook over a chunk of `columns` vectors: result (chunks, m, 256, v). Each of the
// 256 threads owns a centroid and looks through the chunk's codes in order, so sums do not race.
const STRETCH = 256u;
const MAX_V = 8u;
var<workgroup> stretch_codes: array<u32, STRETCH>;
var<workgroup> stretch: array<f32, 2048>; // STRETCH vectors of at most MAX_V

@compute @workgroup_size(256)
fn codebooks_back(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let book = group.y;
  let vectors = p.n * p.k / p.v;
  let end = min(vectors, (group.x + 1u) * p.columns);
  for (var first = 0u; first < p.v; first += MAX_V) {
    let width = min(MAX_V, p.v - first);
    var sum = array<f32, MAX_V>();
    for (var start = group.x * p.columns; start < end; start += STRETCH) {
      workgroupBarrier();
      let vector = start + lane;
      stretch_codes[lane] = SIZE;
      if (vector < end) {
        stretch_codes[lane] = codes[vector * p.m + book];
        let scale = scales[vector * p.v / p.g];
        for (var d = 0u; d < width; d++) {
          stretch[lane * MAX_V + d] =
            scale * gradient[p.extra * p.k + vector * p.v + first + d];
        }
      }
      workgroupBarrier();
      for (var i = 0u; i < STRETCH; i++) {
        if (stretch_codes[i] == lane) {
          for (var d = 0u; d < width; d++) {
            sum[d] += stretch[i * MAX_V + d];
          }
        }
      }
    }
    for (var d = 0u; d < width; d++) {
      result[((group.x * p.m + book) * SIZE + lane) * p.v + first + d] = sum[d];
    }
  }
}

const MAX_BLOCK = 256u;
var<workgroup> slope: array<f32, MAX_BLOCK>;
var<workgroup> change: array<f32, MAX_BLOCK>;
var<workgroup> errors: array<f32, SIZE>;
var<workgroup> choices: array<u32, SIZE>;

// The lane of the smallest error, the lowest of equals; errors[0] is that error.
fn choose(lane: u32, error: f32) -> u32 {
  errors[lane] = error;
  choices[lane] = lane;
  for (var width = SIZE / 2u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (lane < width) {
      let other = errors[lane + width];
      if (other < errors[lane] ||
        (other == errors[lane] && choices[lane + width] < choices[lane])) {
        errors[lane] = other;
        choices[lane] = choices[lane + width];
      }
    }
  }
  workgroupBarrier();
  return choices[0];
}

// Codes of the smallest Hessian-weighted error in columns [extra, extra + columns) of a row, by
// coordinate descent: vector by vector, codebook by codebook, the others held. `gradient` is
// (W_q - W) H (N, K) before; result (N, columns) is how W_q changes. A workgroup per row, a thread
// per centroid; the row's gradient is kept up to date within the block.
@compute @workgroup_size(256)
fn search(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * LINE;
  if (row >= p.n) {
    return;
  }
  if (lane < p.columns) {
    slope[lane] = gradient[row * p.k + p.extra + lane];
    change[lane] = 0.0;
  }
  for (var i = 0u; i < p.columns; i += p.v) {
    let vector = (row * p.k + p.extra + i) / p.v;
    let scale = scales[vector * p.v / p.g];
    for (var turn = 0u; turn < p.passes * p.m; turn++) {
      let book = turn % p.m;
      let old = codes[vector * p.m + book];
      workgroupBarrier();
      // error(c) = s^2 x' H x + 2 s x' slope, x = centroid c - the old centroid.
      var linear = 0.0;
      var square = 0.0;
      for (var d = 0u; d < p.v; d++) {
        let x = codebooks[(book * SIZE + lane) * p.v + d] - codebooks[(book * SIZE + old) * p.v + d];
        var along = 0.0;
        for (var e = 0u; e < p.v; e++) {
          along += hessian[(p.extra - p.origin + i + d) * p.k + p.extra + i + e] *
            (codebooks[(book * SIZE + lane) * p.v + e] - codebooks[(book * SIZE + old) * p.v + e]);
        }
        square += x * along;
        linear += x * slope[i + d];
      }
      let best = choose(lane, scale * (scale * square + 2.0 * linear));
      // No better one: rounding must not turn codes around.
      if (errors[0] < 0.0 && best != old) {
        if (lane < p.columns) {
          var sum = 0.0;
          for (var d = 0u; d < p.v; d++) {
            let by = scale * (codebooks[(book * SIZE + best) * p.v + d] -
              codebooks[(book * SIZE + old) * p.v + d]);
            sum += by * hessian[(p.extra - p.origin + i + d) * p.k + p.extra + lane];
            if (lane == i + d) {
              change[lane] += by;
            }
          }
          slope[lane] += sum;
        }
        if (lane == 0u) {
          codes[vector * p.m + book] = best;
        }
      }
      storageBarrier();
      workgroupBarrier();
    }
  }
  if (lane < p.columns) {
    result[row * p.columns + lane] = change[lane];
  }
}

// Codes nearest to `gradient` read as weights to stand for (a latent copy, (N, K)): a workgroup per
// vector, a thread per centroid.
@compute @workgroup_size(256)
fn nearest(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let vector = group.x + group.y * LINE;
  if (vector >= p.n * p.k / p.v) {
    return;
  }
  let scale = scales[vector * p.v / p.g];
  for (var turn = 0u; turn < p.passes * p.m; turn++) {
    let book = turn % p.m;
    workgroupBarrier();
    var error = 0.0;
    for (var d = 0u; d < p.v; d++) {
      var sum = codebooks[(book * SIZE + lane) * p.v + d];
      for (var j = 0u; j < p.m; j++) {
        if (j != book) {
          sum += codebooks[(j * SIZE + codes[vector * p.m + j]) * p.v + d];
        }
      }
      let by = scale * sum - gradient[vector * p.v + d];
      error += by * by;
    }
    let best = choose(lane, error);
    if (lane == 0u) {
      codes[vector * p.m + book] = best;
    }
    storageBarrier();
    workgroupBarrier();
  }
}
