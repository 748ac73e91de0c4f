/**
 * Plain-loop references of the transformer's kernels, in float64 unless float16 is stored.
 *
 * @module
 */

/** `value` as float16 stores it, saturating. */
export function roundF16(value: number): number {
  return Math.f16round(Math.max(-65504, Math.min(65504, value)));
}

/** RMSNorm of one row, not rounded. */
export function rmsNormReference(
  row: ArrayLike<number>,
  weight: ArrayLike<number>,
  epsilon: number,
): Float64Array {
  let sum = 0;
  for (let i = 0; i < row.length; i++) sum += row[i] * row[i];
  const scale = 1 / Math.sqrt(sum / row.length + epsilon);
  return Float64Array.from(row, (value, i) => value * scale * weight[i]);
}

/** A head's elements turned by `position`'s angles (rotate-half). */
export function ropeReference(
  head: ArrayLike<number>,
  position: number,
  frequencies: ArrayLike<number>,
): Float64Array {
  const half = head.length / 2;
  return Float64Array.from(head, (value, i) => {
    const angle = position * frequencies[i % half];
    const other = i < half ? -head[i + half] : head[i - half];
    return value * Math.cos(angle) + other * Math.sin(angle);
  });
}

/** Softmax attention of one query over `keys` and `values`, position by position. */
export function attentionReference(
  query: ArrayLike<number>,
  keys: ArrayLike<number>[],
  values: ArrayLike<number>[],
): Float64Array {
  const scores = keys.map((key) => {
    let dot = 0;
    for (let i = 0; i < query.length; i++) dot += query[i] * key[i];
    return dot / Math.sqrt(query.length);
  });
  const maximum = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - maximum));
  const sum = weights.reduce((a, b) => a + b, 0);
  return Float64Array.from(query, (_, i) => {
    let weighted = 0;
    for (let p = 0; p < values.length; p++) weighted += weights[p] * values[p][i];
    return weighted / sum;
  });
}

/** `silu(gate) * up`. */
export function swigluReference(gate: number, up: number): number {
  return gate / (1 + Math.exp(-gate)) * up;
}
