import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { randomInt, seededRandom } from "../shared/random.ts";
import { Gpu } from "./gpu.ts";
import { Readback } from "./readback.ts";

const FILL_WGSL = /* wgsl */ `
@group(0) @binding(0) var<uniform> key: vec4<u32>;
@group(0) @binding(1) var<storage, read_write> words: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x < arrayLength(&words)) { words[id.x] = (id.x ^ key.x) * 2654435761u; }
}
`;

const filled = (key: number, i: number) => Math.imul(i ^ key, 2654435761) >>> 0;

async function filler(gpu: Gpu, words: number) {
  const buffer = gpu.storage("words", words * 4);
  const key = gpu.buffer("key", 16, GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST);
  const pipeline = await gpu.pipeline({ label: "fill", code: FILL_WGSL });
  const bindGroup = gpu.device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [
      { binding: 0, resource: { buffer: key } },
      { binding: 1, resource: { buffer } },
    ],
  });
  const encode = (encoder: GPUCommandEncoder, value: number) => {
    gpu.write(key, 0, Uint32Array.of(value, 0, 0, 0));
    const pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, bindGroup);
    pass.dispatchWorkgroups(Math.ceil(words / 64));
    pass.end();
  };
  return { buffer, encode };
}

Deno.test("Readback reads what the GPU just computed, thousands of times, and never an old value", async () => {
  const gpu = await Gpu.open({ software: true });
  const words = 2048;
  const { buffer, encode } = await filler(gpu, words);
  const readback = await Readback.create(gpu, words * 4);
  const random = seededRandom(11);
  for (let i = 0; i < 4000; i++) {
    const offset = randomInt(random, words - 8), count = 1 + randomInt(random, words - offset - 1);
    const encoder = gpu.device.createCommandEncoder();
    encode(encoder, i);
    const slot = readback.copy(encoder, [{ buffer, offset: offset * 4, bytes: count * 4 }]);
    gpu.device.queue.submit([encoder.finish()]);
    const read = new Uint32Array((await readback.read(slot)).buffer, 0, count);
    for (const at of [0, count >> 1, count - 1]) {
      assertEquals(read[at], filled(i, offset + at), `read ${i}, word ${at}`);
    }
  }
  readback.destroy();
  gpu.close();
});

Deno.test("Readback needs no sleep here, and reads the same bytes where it does", async () => {
  const gpu = await Gpu.open({ software: true });
  const { buffer, encode } = await filler(gpu, 64);
  for (const way of ["probe", "wait"] as const) {
    const readback = await Readback.create(gpu, 256, 2, way);
    assertEquals(readback.immediate, way === "probe");
    for (let i = 0; i < 3; i++) {
      const encoder = gpu.device.createCommandEncoder();
      encode(encoder, i);
      const slot = readback.copy(encoder, [{ buffer, offset: 0, bytes: 256 }]);
      gpu.device.queue.submit([encoder.finish()]);
      const words = new Uint32Array((await readback.read(slot)).buffer, 0, 64);
      assertEquals(words, Uint32Array.from({ length: 64 }, (_, at) => filled(i, at)));
    }
  }
  gpu.close();
});

Deno.test("Readback takes several ranges into one slot and reads slots in any order", async () => {
  const gpu = await Gpu.open({ software: true });
  const { buffer, encode } = await filler(gpu, 256);
  const readback = await Readback.create(gpu, 1024, 3);
  const slots = [5, 6, 7].map((key) => {
    const encoder = gpu.device.createCommandEncoder();
    encode(encoder, key);
    const slot = readback.copy(encoder, [
      { buffer, offset: 400, bytes: 8 },
      { buffer, offset: 0, bytes: 0 },
      { buffer, offset: 40, bytes: 4 },
    ]);
    gpu.device.queue.submit([encoder.finish()]);
    return slot;
  });
  for (const at of [2, 0, 1]) {
    const bytes = await readback.read(slots[at]);
    assertEquals(bytes.length, 12);
    const key = 5 + at;
    const expected = [filled(key, 100), filled(key, 101), filled(key, 10)];
    assertEquals([...new Uint32Array(bytes.buffer, 0, 3)], expected);
  }
  gpu.close();
});

Deno.test("Readback refuses more copies than it has slots, and takes a released one back", async () => {
  const gpu = await Gpu.open({ software: true });
  const buffer = gpu.storage("words", 64);
  const readback = await Readback.create(gpu, 64, 2);
  const encoder = gpu.device.createCommandEncoder();
  const range = { buffer, offset: 0, bytes: 64 };
  const first = readback.copy(encoder, [range]);
  readback.copy(encoder, [range]);
  assertThrows(() => readback.copy(encoder, [range]), Error, "at most 2 copies");
  readback.release(first);
  await assertRejects(() => readback.read(first), Error, "once");
  assertThrows(() => readback.copy(encoder, [range, range]), Error, "fit a readback of 64");
  readback.copy(encoder, [range]);
  gpu.close();
});

Deno.test("Readback fails when the work of a step was never run, and on a failed device", async () => {
  const gpu = await Gpu.open({ software: true });
  const buffer = gpu.storage("words", 64);
  const readback = await Readback.create(gpu, 64);
  const encoder = gpu.device.createCommandEncoder();
  const slot = readback.copy(encoder, [{ buffer, offset: 0, bytes: 64 }]);
  encoder.copyBufferToBuffer(buffer, 0, buffer, 4096, 64); // out of range: the submit is invalid
  gpu.device.queue.submit([encoder.finish()]);
  await assertRejects(() => readback.read(slot), FleetError);
  const later = gpu.device.createCommandEncoder();
  const next = readback.copy(later, [{ buffer, offset: 0, bytes: 64 }]);
  gpu.device.queue.submit([later.finish()]);
  assert(gpu.failure, "the device told of the invalid submit");
  await assertRejects(() => readback.read(next), FleetError, gpu.failure.message);
  gpu.close();
});
