/**
 * The whole model in plain loops on the CPU, in float64 throughout: what the GPU's answers are
 * compared with. It rounds nowhere, so it also shows what float16 storage costs.
 *
 * @module
 */
import { toFloat32 } from "../shared/checkpoint/mod.ts";
import {
  codesPerWord,
  LINEAR_NAMES,
  type LinearName,
  linearShape,
  matrixFormat,
  type ModelConfig,
  type TensorSource,
} from "../shared/model_config.ts";
import {
  attentionReference,
  rmsNormReference,
  ropeReference,
  swigluReference,
} from "../kernels/transformer/reference.ts";
import { ropeFrequencies } from "../kernels/transformer/mod.ts";

/** A matrix in row-major order, whatever it was stored as. */
interface ReferenceMatrix {
  n: number;
  k: number;
  values: Float32Array;
}

interface ReferenceLayer {
  inputNorm: Float32Array;
  postNorm: Float32Array;
  linear: Record<LinearName, ReferenceMatrix>;
}

/** A model on the CPU. */
export interface ReferenceModel {
  /** The logits that follow each of `tokens`, `(tokens, vocab)`. */
  logits(tokens: ArrayLike<number>): Float64Array[];
}

/** Reads all weights; for models small enough for plain loops. */
export async function loadReference(
  config: ModelConfig,
  tensors: TensorSource,
): Promise<ReferenceModel> {
  const floats = (name: string) => readFloats(tensors, name);
  const layers: ReferenceLayer[] = [];
  for (let i = 0; i < config.layers; i++) {
    const prefix = `model.layers.${i}`;
    const linear = {} as Record<LinearName, ReferenceMatrix>;
    for (const name of LINEAR_NAMES) {
      const shape = linearShape(config, name);
      linear[name] = await readMatrix(config, tensors, `${prefix}.${name}`, shape);
    }
    layers.push({
      inputNorm: await floats(`${prefix}.input_layernorm.weight`),
      postNorm: await floats(`${prefix}.post_attention_layernorm.weight`),
      linear,
    });
  }
  const { hiddenSize, vocabSize } = config;
  const embedding = await floats("model.embed_tokens.weight");
  const finalNorm = await floats("model.norm.weight");
  const head: ReferenceMatrix = {
    n: vocabSize,
    k: hiddenSize,
    values: config.tiedEmbeddings ? embedding : await floats("lm_head.weight"),
  };
  return {
    logits(tokens) {
      let residual: Float64Array[] = Array.from(
        tokens,
        (token) => Float64Array.from(row(embedding, token, hiddenSize)),
      );
      for (const layer of layers) residual = forwardLayer(config, layer, residual);
      return residual.map((x) => multiply(head, rmsNormReference(x, finalNorm, config.rmsNormEps)));
    },
  };
}

/** One layer over all positions of one sequence. */
function forwardLayer(
  config: ModelConfig,
  { inputNorm, postNorm, linear }: ReferenceLayer,
  residual: Float64Array[],
): Float64Array[] {
  const { heads, kvHeads, headDim, rmsNormEps: epsilon } = config;
  const frequencies = ropeFrequencies({
    headDim,
    theta: config.ropeTheta,
    scaling: config.ropeScaling,
  });
  const normed = residual.map((x) => rmsNormReference(x, inputNorm, epsilon));
  const split = (name: LinearName, turn: boolean) =>
    normed.map((x, position) =>
      headsOf(multiply(linear[name], x), headDim)
        .map((head) => turn ? ropeReference(head, position, frequencies) : head)
    );
  const queries = split("self_attn.q_proj", true);
  const keys = split("self_attn.k_proj", true);
  const values = split("self_attn.v_proj", false);
  return residual.map((x, position) => {
    const attended = new Float64Array(heads * headDim);
    for (let head = 0; head < heads; head++) {
      const kvHead = Math.floor(head * kvHeads / heads);
      const result = attentionReference(
        queries[position][head],
        keys.slice(0, position + 1).map((at) => at[kvHead]),
        values.slice(0, position + 1).map((at) => at[kvHead]),
      );
      attended.set(result, head * headDim);
    }
    const between = add(x, multiply(linear["self_attn.o_proj"], attended));
    const again = rmsNormReference(between, postNorm, epsilon);
    const gate = multiply(linear["mlp.gate_proj"], again);
    const up = multiply(linear["mlp.up_proj"], again);
    const gated = gate.map((value, i) => swigluReference(value, up[i]));
    return add(between, multiply(linear["mlp.down_proj"], gated));
  });
}

function multiply({ n, k, values }: ReferenceMatrix, x: Float64Array): Float64Array {
  const out = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    let sum = 0;
    for (let j = 0; j < k; j++) sum += values[i * k + j] * x[j];
    out[i] = sum;
  }
  return out;
}

function add(a: Float64Array, b: Float64Array): Float64Array {
  return a.map((value, i) => value + b[i]);
}

function row(table: Float32Array, index: number, width: number): Float32Array {
  return table.subarray(index * width, (index + 1) * width);
}

function headsOf(values: Float64Array, headDim: number): Float64Array[] {
  return Array.from(
    { length: values.length / headDim },
    (_, head) => values.subarray(head * headDim, (head + 1) * headDim),
  );
}

async function readFloats(tensors: TensorSource, name: string): Promise<Float32Array> {
  const { dtype, bytes } = tensors.info(name);
  return toFloat32(name, dtype, await tensors.read(name, 0, bytes));
}

/** A matrix, dequantized where it is stored as codes (layout: `shared/checkpoint/layout.ts`). */
async function readMatrix(
  config: ModelConfig,
  tensors: TensorSource,
  name: string,
  [n, k]: [n: number, k: number],
): Promise<ReferenceMatrix> {
  if (tensors.has(`${name}.weight`)) {
    return { n, k, values: await readFloats(tensors, `${name}.weight`) };
  }
  const { m, v, g, b } = matrixFormat(config.codegemm!, k);
  const perWord = codesPerWord({ b }), codeBytes = 4 / perWord;
  const codes = await tensors.read(`${name}.codes`, 0, tensors.info(`${name}.codes`).bytes);
  const codebooks = await readFloats(tensors, `${name}.codebooks`);
  const scales = await readFloats(tensors, `${name}.scales`);
  const values = new Float32Array(n * k);
  for (let row = 0; row < n; row++) {
    for (let column = 0; column < k; column++) {
      const position = Math.floor(column / v);
      let sum = 0;
      for (let book = 0; book < m; book++) {
        const word = (book * k / v / perWord + Math.floor(position / perWord)) * n + row;
        const at = word * 4 + (position % perWord) * codeBytes;
        const code = codeBytes === 1 ? codes[at] : codes[at] + 256 * codes[at + 1];
        sum += codebooks[(book * 2 ** b + code) * v + column % v];
      }
      values[row * k + column] = sum * scales[Math.floor(column / g) * n + row];
    }
  }
  return { n, k, values };
}
