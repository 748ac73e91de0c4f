import { assert, assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import { FleetError } from "../errors.ts";
import { randomInt, seededRandom } from "../random.ts";
import { tensorBytes } from "./fixture.ts";
import { encodeSafetensors, readHeader } from "./safetensors.ts";
import { memorySource } from "./source.ts";

const FILE = "model-00002-of-00003.safetensors";

/** A file with any header and any bytes behind it. */
function file(header: unknown, dataBytes: number, headerLength?: number): Uint8Array {
  const json = new TextEncoder().encode(
    typeof header === "string" ? header : JSON.stringify(header),
  );
  const bytes = new Uint8Array(8 + json.length + dataBytes);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(headerLength ?? json.length), true);
  bytes.set(json, 8);
  return bytes;
}

const read = (bytes: Uint8Array) => readHeader(memorySource({ [FILE]: bytes }), FILE);

async function refused(bytes: Uint8Array, ...words: string[]): Promise<void> {
  const error = await assertRejects(() => read(bytes), FleetError);
  assertEquals(error.code, "bad-checkpoint");
  for (const word of [FILE, ...words]) assertStringIncludes(error.message, word);
}

const tensor = (begin: number, end: number, shape = [end - begin], dtype = "U8") => ({
  dtype,
  shape,
  data_offsets: [begin, end],
});

Deno.test("what is encoded is read back: names, types, shapes and bytes in their places", async () => {
  const tensors = [
    tensorBytes("b", "F16", [2, 3], Uint8Array.from({ length: 12 }, (_, i) => i)),
    tensorBytes("a", "I32", [1], Uint8Array.of(9, 8, 7, 6)),
    tensorBytes("empty", "F32", [0, 4], new Uint8Array()),
    tensorBytes("scalar", "BF16", [], Uint8Array.of(1, 2)),
  ];
  const bytes = encodeSafetensors(tensors);
  const stored = await read(bytes);
  for (const { name, dtype, shape, data } of tensors) {
    const found = stored.find((item) => item.name === name)!;
    assertEquals([found.dtype, found.shape, found.bytes], [dtype, shape, data.length]);
    assertEquals(bytes.slice(found.fileOffset, found.fileOffset + found.bytes), data);
  }
  assertEquals(stored.find((item) => item.name === "b")!.fileOffset % 8, 0);
});

Deno.test("an empty file, and one without any tensor", async () => {
  await refused(new Uint8Array(), "0 bytes are too few");
  await refused(new Uint8Array(7), "truncated");
  assertEquals(await read(file({}, 0)), []);
});

Deno.test("a header length beyond the file or beyond belief", async () => {
  await refused(file({ a: tensor(0, 4) }, 4, 1000), "header claims 1000 bytes", "truncated");
  await refused(file({}, 0, 2 ** 40), "not a safetensors file");
  await refused(new Uint8Array(64).fill(0xff), "not a safetensors file");
});

Deno.test("a header that is no JSON object, or no text", async () => {
  await refused(file("{", 0), "is not JSON");
  await refused(file("[]", 0), "is not a JSON object");
  await refused(file("null", 0), "is not a JSON object");
  const garbled = file({ a: tensor(0, 4) }, 4);
  garbled[10] = 0xff;
  await refused(garbled, "not UTF-8");
});

Deno.test("a truncated file names the first tensor that is cut", async () => {
  const bytes = encodeSafetensors([
    tensorBytes("first", "F32", [4], new Uint8Array(16)),
    tensorBytes("second", "F32", [4], new Uint8Array(16)),
  ]);
  await refused(bytes.slice(0, -1), "tensor second", "truncated");
  await refused(bytes.slice(0, -17), "tensor first", "truncated");
});

Deno.test("offsets that lie", async () => {
  await refused(file({ a: tensor(0, 400) }, 8), "tensor a", "truncated or its header lies");
  await refused(file({ a: tensor(8, 4, [4]) }, 8), "tensor a ends (byte 4) before it begins");
  await refused(file({ a: tensor(0, 4), b: tensor(2, 6) }, 6), "tensor b overlaps a");
  await refused(file({ a: tensor(0, 4), b: tensor(0, 4) }, 4), "overlaps");
  await refused(file({ a: tensor(0, 4), b: tensor(6, 8) }, 8), "before b, belong to no tensor");
  await refused(file({ a: tensor(2, 4) }, 4), "before a, belong to no tensor");
  await refused(file({ a: tensor(0, 4) }, 5), "belong to no tensor");
  await refused(file({ a: { ...tensor(0, 4), data_offsets: [-4, 0] } }, 4), "data_offsets");
  await refused(file({ a: { ...tensor(0, 4), data_offsets: [0, 2 ** 60] } }, 4), "data_offsets");
  await refused(file({ a: { ...tensor(0, 4), data_offsets: [0] } }, 4), "data_offsets");
  await refused(file({ a: { ...tensor(0, 4), data_offsets: ["0", "4"] } }, 4), "data_offsets");
});

Deno.test("types and shapes that lie", async () => {
  await refused(file({ a: tensor(0, 4, [3], "F16") }, 4), "tensor a is F16 [3]", "6 bytes", "4");
  await refused(file({ a: tensor(0, 4, [2, -1]) }, 4), "tensor a has no valid shape");
  await refused(file({ a: tensor(0, 4, [1.5]) }, 4), "tensor a has no valid shape");
  await refused(file({ a: tensor(0, 4, [2 ** 40, 2 ** 40]) }, 4), "tensor a is U8");
  await refused(file({ a: tensor(0, 4, [4], "INT4") }, 4), "tensor a has the unknown dtype INT4");
  await refused(file({ a: tensor(0, 4, [4], "constructor") }, 4), "unknown dtype");
  await refused(file({ a: null }, 4), "tensor a has no dtype");
  await refused(
    file({ a: { dtype: "U8", data_offsets: [0, 4] } }, 4),
    "tensor a has no valid shape",
  );
});

Deno.test("types that are not read are still measured", async () => {
  assertEquals(
    (await read(file({ a: tensor(0, 16, [2], "I64"), b: tensor(16, 17, [2], "F4") }, 17)))
      .map(({ dtype, bytes }) => [dtype, bytes]),
    [["I64", 16], ["F4", 1]],
  );
  await refused(file({ a: tensor(0, 8, [2], "I64") }, 8), "tensor a is I64 [2]", "16 bytes");
});

Deno.test("any single damaged byte of a header is refused, or still a file without contradictions", async () => {
  const bytes = encodeSafetensors([
    tensorBytes("model.norm.weight", "F16", [8], new Uint8Array(16)),
    tensorBytes("lm_head.weight", "F32", [2, 3], new Uint8Array(24)),
  ]);
  const random = seededRandom(3);
  let refusals = 0;
  for (let i = 0; i < 500; i++) {
    const damaged = bytes.slice();
    damaged[randomInt(random, bytes.length - 40)] = randomInt(random, 256);
    try {
      for (const { fileOffset, bytes: size } of await read(damaged)) {
        assert(fileOffset + size <= damaged.length);
      }
    } catch (error) {
      assert(error instanceof FleetError && error.code === "bad-checkpoint", String(error));
      refusals++;
    }
  }
  assert(refusals > 250, `${refusals} of 500 refused`);
});
