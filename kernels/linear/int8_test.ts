import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { seededRandom } from "../../shared/random.ts";
import { withGpu } from "../gpu_fixture.ts";
import { INT8_MAX, int8Books, int8Wgsl, inverseOf, roundToInt8 } from "./int8.ts";

Deno.test("roundToInt8() is off by half a step at most, and reaches both ends", () => {
  const random = seededRandom(1);
  const values = Array.from({ length: 64 }, () => random() - 0.5);
  for (const sign of [1, -1]) {
    const group = [...values, sign];
    const { q, scale } = roundToInt8(group);
    assertEquals(q.at(-1), sign * INT8_MAX);
    // The quotient has twelve bits: at the ends it may be off by a part of a step more.
    group.forEach((value, i) => assert(Math.abs(scale * q[i] - value) <= scale * 0.54));
  }
});

Deno.test("roundToInt8() takes ties to the even neighbour", () => {
  const { q, scale } = roundToInt8([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127]);
  assertEquals([...q], [0, 2, 2, 0, -2, -2, 127]);
  assertAlmostEquals(scale, 1, 1e-6);
});

Deno.test("what groups are multiplied with does not depend on how a division rounds", () => {
  const words = Uint16Array.from({ length: 0x7bff }, (_, i) => i + 1);
  for (const most of new Float16Array(words.buffer)) {
    const quotient = Float32Array.of(INT8_MAX / most);
    const bits = new Uint32Array(quotient.buffer);
    const [exact] = bits;
    for (const places of [-8, 8]) {
      bits[0] = exact + places;
      assertEquals(inverseOf(most, quotient[0]), inverseOf(most));
    }
    assert(Math.abs(inverseOf(most) * most - INT8_MAX) < INT8_MAX * 2 ** -11);
  }
});

Deno.test("roundToInt8() of zeros is zeros, and of the smallest float16 numbers is finite", () => {
  assertEquals(roundToInt8([0, -0, 0]), { q: Int8Array.of(0, 0, 0), most: 0, scale: 0 });
  const { q, scale } = roundToInt8([2 ** -24, -(2 ** -24), 0]);
  assertEquals([...q], [127, -127, 0]);
  assertAlmostEquals(scale * 127, 2 ** -24, 2 ** -40);
});

Deno.test("int8Books() rounds each matrix of a stack by itself, and puts the scales last", () => {
  const each = 2 * 256 * 4;
  const random = seededRandom(2);
  const centroids = Float16Array.from({ length: 3 * each }, (_, i) => {
    return (random() - 0.5) * 10 ** Math.floor(i / each);
  });
  const words = int8Books(centroids, 3);
  assertEquals(words.length, 3 * each / 4 + 3);
  const scales = new Float32Array(words.buffer, 3 * each, 3);
  const integers = new Int8Array(words.buffer, 0, 3 * each);
  for (let member = 0; member < 3; member++) {
    const own = centroids.subarray(member * each, (member + 1) * each);
    const { q, scale } = roundToInt8(own);
    assertEquals(integers.subarray(member * each, (member + 1) * each), q);
    assertAlmostEquals(scales[member], scale / INT8_MAX, 1e-6 * scale);
  }
});

Deno.test("WGSL without packed dot products makes the same integers, and so does roundToInt8()", () =>
  withGpu(async (gpu) => {
    const random = seededRandom(3);
    const count = 512;
    const values = Float32Array.from(
      { length: 4 * count },
      () => Math.max(-127, Math.min(127, Math.round((random() - 0.5) * 520) / 2)),
    );
    const run = async (packed: boolean) => {
      const x = gpu.upload("values", values);
      const y = gpu.storage("words", 8 * count);
      const bindings = ["read", "write"] as const;
      const pipeline = await gpu.pipeline({
        label: "int8",
        code: `enable f16;${int8Wgsl(packed)}
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec2<u32>>;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let word = pack_int8(x[id.x]);
  y[id.x] = vec2<u32>(word, bitcast<u32>(dot_int8(word, pack_int8(x[${count - 1}u - id.x]))));
}`,
        bindings,
      });
      const encoder = gpu.device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      pass.setPipeline(pipeline);
      const entries = [x, y].map((buffer, binding) => ({ binding, resource: { buffer } }));
      const layout = gpu.bindings(bindings);
      pass.setBindGroup(0, gpu.device.createBindGroup({ layout, entries }));
      pass.dispatchWorkgroups(count / 64);
      pass.end();
      gpu.device.queue.submit([encoder.finish()]);
      const words = new Int32Array(await gpu.read(y, 8 * count));
      x.destroy();
      y.destroy();
      return words;
    };
    const packed = await run(true);
    assertEquals(await run(false), packed);
    // Of this scale the values are what they are rounded to.
    const { q } = roundToInt8([...values, 127]);
    const rounded = (i: number) => [...q.subarray(4 * i, 4 * i + 4)];
    for (let i = 0; i < count; i++) {
      assertEquals([...new Int8Array(packed.buffer, 8 * i, 4)], rounded(i));
      const other = rounded(count - 1 - i);
      assertEquals(packed[2 * i + 1], rounded(i).reduce((sum, a, e) => sum + a * other[e], 0));
    }
  }));
