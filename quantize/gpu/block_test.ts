import { assert, assertLess } from "@std/assert";
import { Gpu } from "../../kernels/gpu.ts";
import { ropeFrequencies } from "../../kernels/transformer/mod.ts";
import {
  attentionReference,
  rmsNormReference,
  ropeReference,
  swigluReference,
} from "../../kernels/transformer/reference.ts";
import { TINY_CONFIG } from "../../shared/checkpoint/fixture.ts";
import { parseModelConfig } from "../../shared/checkpoint/mod.ts";
import { LINEAR_NAMES, type LinearName, linearShape } from "../../shared/model_config.ts";
import { gaussian, seededRandom } from "../../shared/random.ts";
import { createBlock } from "./block.ts";
import { Recorder } from "./operation.ts";

const config = parseModelConfig(JSON.stringify(TINY_CONFIG));
const SEQUENCES = 2, TOKENS = 8, HIDDEN = config.hiddenSize, ROWS = SEQUENCES * TOKENS;

interface Weights {
  matrices: Record<LinearName, Float64Array>;
  norms: { input: Float64Array; post: Float64Array };
}

/** The layer in plain loops and float64: rows in, rows out. */
function layerReference({ matrices, norms }: Weights, x: Float64Array): Float64Array {
  const { heads, kvHeads, headDim } = config;
  const frequencies = ropeFrequencies({ headDim, theta: config.ropeTheta, scaling: null });
  const multiply = (name: LinearName, input: Float64Array) => {
    const [n, k] = linearShape(config, name);
    return Float64Array.from({ length: n }, (_, row) => {
      let sum = 0;
      for (let i = 0; i < k; i++) sum += matrices[name][row * k + i] * input[i];
      return sum;
    });
  };
  const out = new Float64Array(x.length);
  for (let sequence = 0; sequence < SEQUENCES; sequence++) {
    const rows = Array.from(
      { length: TOKENS },
      (_, t) => x.subarray((sequence * TOKENS + t) * HIDDEN, (sequence * TOKENS + t + 1) * HIDDEN),
    );
    const normed = rows.map((row) => rmsNormReference(row, norms.input, config.rmsNormEps));
    const split = (name: LinearName, turn: boolean) =>
      normed.map((row, position) => {
        const all = multiply(name, row);
        return Array.from({ length: all.length / headDim }, (_, head) => {
          const part = all.subarray(head * headDim, (head + 1) * headDim);
          return turn ? ropeReference(part, position, frequencies) : part;
        });
      });
    const q = split("self_attn.q_proj", true);
    const k = split("self_attn.k_proj", true);
    const v = split("self_attn.v_proj", false);
    rows.forEach((row, t) => {
      const attended = new Float64Array(heads * headDim);
      for (let head = 0; head < heads; head++) {
        const kv = Math.floor(head * kvHeads / heads);
        const seen = (all: Float64Array[][]) => all.slice(0, t + 1).map((at) => at[kv]);
        attended.set(attentionReference(q[t][head], seen(k), seen(v)), head * headDim);
      }
      const o = multiply("self_attn.o_proj", attended);
      const between = row.map((value, i) => value + o[i]);
      const again = rmsNormReference(between, norms.post, config.rmsNormEps);
      const gate = multiply("mlp.gate_proj", again), up = multiply("mlp.up_proj", again);
      const down = multiply("mlp.down_proj", gate.map((value, i) => swigluReference(value, up[i])));
      out.set(between.map((value, i) => value + down[i]), (sequence * TOKENS + t) * HIDDEN);
    });
  }
  return out;
}

function relative(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let error = 0, norm = 0;
  for (let i = 0; i < b.length; i++) {
    error += (a[i] - b[i]) ** 2;
    norm += b[i] ** 2;
  }
  return Math.sqrt(error / norm);
}

Deno.test("a layer's forward and backward agree with plain loops and their finite differences", async () => {
  const random = seededRandom(3);
  const normal = (count: number, scale: number, mean = 0) =>
    Float64Array.from(
      { length: count },
      () => Math.fround(mean + scale * gaussian(random)),
    );
  const weights: Weights = {
    matrices: Object.fromEntries(LINEAR_NAMES.map((name) => {
      const [n, k] = linearShape(config, name);
      return [name, normal(n * k, 1 / Math.sqrt(k))];
    })) as Record<LinearName, Float64Array>,
    norms: { input: normal(HIDDEN, 0.2, 1), post: normal(HIDDEN, 0.2, 1) },
  };
  const x = normal(ROWS * HIDDEN, 1), dout = normal(ROWS * HIDDEN, 1);
  const gpu = await Gpu.open({ software: true, limits: "default" });
  const recorder = new Recorder(gpu);
  try {
    const block = await createBlock(recorder, config, { sequences: SEQUENCES, tokens: TOKENS });
    gpu.write(block.x, 0, Float32Array.from(x));
    gpu.write(block.dout, 0, Float32Array.from(dout));
    for (const which of ["input", "post"] as const) {
      gpu.write(block.norms[which], 0, Float32Array.from(weights.norms[which]));
    }
    for (const name of LINEAR_NAMES) {
      const { buffer, row } = block.matrices[name];
      const [, k] = linearShape(config, name);
      gpu.write(buffer, row * k * 4, Float32Array.from(weights.matrices[name]));
    }
    recorder.run([...block.forward, ...block.backward]);
    const out = layerReference(weights, x);
    assertLess(relative(await recorder.floats(block.out, x.length), out), 1e-5);

    // The loss is <dout, out>: its derivative along a random direction, by central differences.
    const loss = () =>
      layerReference(weights, x).reduce((sum, value, i) => sum + value * dout[i], 0);
    const along = (parameters: Float64Array) => {
      const direction = normal(parameters.length, 1), kept = parameters.slice(), step = 1e-5;
      const shifted = (by: number) => {
        parameters.forEach((_, i) => parameters[i] = kept[i] + by * direction[i]);
        return loss();
      };
      const slope = (shifted(step) - shifted(-step)) / (2 * step);
      parameters.set(kept);
      return { direction, slope };
    };
    const check = (what: string, gradient: Float32Array, parameters: Float64Array) => {
      const { direction, slope } = along(parameters);
      let dot = 0, size = 0;
      gradient.forEach((value, i) => {
        dot += value * direction[i];
        size += value * value;
      });
      assert(size > 0, what);
      assertLess(Math.abs(dot - slope) / Math.sqrt(size), 1e-4, what);
    };
    check("x", await recorder.floats(block.dx, x.length), x);
    for (const which of ["input", "post"] as const) {
      const gradient = await recorder.floats(block.normGradients[which], HIDDEN);
      check(`${which} norm`, gradient, weights.norms[which]);
    }
    for (const name of LINEAR_NAMES) {
      const { row } = block.matrices[name], gradient = block.gradients[name];
      const [n, k] = linearShape(config, name);
      const all = await recorder.floats(gradient, (row + n) * k);
      check(name, all.subarray(row * k), weights.matrices[name]);
    }
  } finally {
    recorder.destroy();
    gpu.close();
  }
});
