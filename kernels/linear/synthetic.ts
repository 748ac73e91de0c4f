/**
 * Matrices of random weights made on the GPU itself, for benchmarks of models that no disk holds.
 *
 * @module
 */
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import { gaussian, seededRandom } from "../../shared/random.ts";
import type { Gpu } from "../gpu.ts";
import { int8Books } from "./int8.ts";
import { allocateCodes, allocateDense, type LoadOptions } from "./matrix.ts";
import type { Matrix } from "./types.ts";

const THREADS = 256;
/** Workgroups along x; the rest goes along y. */
const GROUPS_X = 4096;

/**
 * Fills words with a hash of their index (MurmurHash3's finalizer, by Austin Appleby): as random codes
 * they are, or as pairs of float16 magnitudes in [1, 2) times a power of two and a random sign.
 */
const FILL_WGSL = /* wgsl */ `
struct Fill { words: u32, seed: u32, and_mask: u32, or_mask: u32 }
@group(0) @binding(0) var<uniform> fill: Fill;
@group(0) @binding(1) var<storage, read_write> words: array<u32>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let i = id.y * ${GROUPS_X * THREADS}u + id.x;
  if (i >= fill.words) { return; }
  var h = (i ^ fill.seed) * 0x85ebca6bu;
  h = (h ^ (h >> 13u)) * 0xc2b2ae35u;
  h = (h ^ (h >> 16u)) * 0x27d4eb2fu;
  words[i] = ((h ^ (h >> 15u)) & fill.and_mask) | fill.or_mask;
}
`;

/** What random words are made into. */
type Pattern = { and: number; or: number };
const ANY: Pattern = { and: 0xffffffff, or: 0 };

/** Pairs of float16 numbers of about `magnitude`; positive ones, or of both signs. */
function float16Pattern(magnitude: number, signed: boolean): Pattern {
  const exponent = Math.max(1, Math.min(30, 15 + Math.floor(Math.log2(magnitude))));
  const half = exponent << 10;
  const mantissas = 0x03ff03ff | (signed ? 0x80008000 : 0);
  return { and: mantissas >>> 0, or: (half | (half << 16)) >>> 0 };
}

/**
 * A random CodeGEMM matrix whose outputs are about as large as its inputs.
 *
 * @param members rows of N of each matrix of a stack
 */
export async function syntheticCodes(
  gpu: Gpu,
  name: string,
  members: readonly number[],
  k: number,
  format: CodeGemmFormat,
  seed: number,
  options: LoadOptions = {},
): Promise<Matrix> {
  const matrix = await allocateCodes(gpu, name, members, k, format, options);
  const scale = float16Pattern(0.7 / Math.sqrt(k), false);
  for (const [i, block] of matrix.blocks.entries()) {
    await fillRandom(gpu, block.weights, ANY, seed + i);
    await fillRandom(gpu, block.scales!, scale, seed + i + 1);
  }
  if (matrix.int8Codebooks) writeCentroids(gpu, matrix, seed);
  else {
    const centroid = float16Pattern(1 / Math.sqrt(format.m), true);
    await fillRandom(gpu, matrix.codebooks!, centroid, seed);
  }
  return matrix;
}

/** Random centroids of about `1 / sqrt(m)` for every member, in float16 and in integers. */
function writeCentroids(
  gpu: Gpu,
  { format, members, codebooks, int8Codebooks }: Matrix,
  seed: number,
): void {
  const { m, v, b } = format!;
  const random = seededRandom(seed);
  const centroids = Float16Array.from(
    { length: members.length * m * 2 ** b * v },
    () => gaussian(random) / Math.sqrt(m),
  );
  gpu.write(codebooks!, 0, new Uint16Array(centroids.buffer));
  gpu.write(int8Codebooks!, 0, int8Books(centroids, members.length));
}

/** A random dense matrix whose outputs are about as large as its inputs. */
export async function syntheticDense(
  gpu: Gpu,
  name: string,
  n: number,
  k: number,
  seed: number,
  options: LoadOptions = {},
): Promise<Matrix> {
  const matrix = await allocateDense(gpu, name, [n, k], options);
  const weight = float16Pattern(0.7 / Math.sqrt(k), true);
  for (const [i, block] of matrix.blocks.entries()) {
    await fillRandom(gpu, block.weights, weight, seed + i);
  }
  return matrix;
}

async function fillRandom(
  gpu: Gpu,
  buffer: GPUBuffer,
  pattern: Pattern,
  seed: number,
): Promise<void> {
  const bindings = ["uniform", "write"] as const;
  const pipeline = await gpu.pipeline({ label: "random words", code: FILL_WGSL, bindings });
  const words = buffer.size / 4;
  const uniform = gpu.buffer("fill", 16, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST);
  gpu.write(uniform, 0, Uint32Array.of(words, seed, pattern.and, pattern.or));
  const encoder = gpu.device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  pass.setBindGroup(
    0,
    gpu.device.createBindGroup({
      layout: gpu.bindings(bindings),
      entries: [
        { binding: 0, resource: { buffer: uniform } },
        { binding: 1, resource: { buffer } },
      ],
    }),
  );
  const groups = Math.ceil(words / THREADS);
  pass.dispatchWorkgroups(Math.min(groups, GROUPS_X), Math.ceil(groups / GROUPS_X));
  pass.end();
  gpu.device.queue.submit([encoder.finish()]);
  uniform.destroy();
}
