import { assert, assertEquals, assertRejects } from "@std/assert";
import { FleetError } from "../../shared/errors.ts";
import type { CodeGemmFormat, DType, TensorSource } from "../../shared/model_config.ts";
import { DTYPE_BYTES, ROW_SCALE } from "../../shared/model_config.ts";
import { withGpu } from "../gpu_fixture.ts";
import { loadMatrix, matrixBytes } from "./matrix.ts";
import { randomTensors } from "./random_tensors.ts";
import { randomActivations, runLinear, stepShape } from "./rig.ts";
import { bitsOf } from "./rig.ts";

const FORMAT: CodeGemmFormat = { m: 1, v: 4, g: 32, b: 8 };

interface Stored {
  dtype: DType;
  shape: number[];
  data: ArrayBufferView<ArrayBuffer>;
}

/** Tensors in memory. */
function source(tensors: Record<string, Stored>): TensorSource {
  const find = (name: string) => {
    const found = tensors[name];
    if (!found) throw new FleetError("bad-checkpoint", `There is no tensor ${name}`);
    return found;
  };
  return {
    names: () => Object.keys(tensors),
    has: (name) => name in tensors,
    info: (name) => {
      const { dtype, shape } = find(name);
      return { name, dtype, shape, bytes: shape.reduce((a, b) => a * b, DTYPE_BYTES[dtype]) };
    },
    read: (name, offset, length) => {
      const { data } = find(name);
      return Promise.resolve(
        new Uint8Array(data.buffer, data.byteOffset + offset, length).slice(),
      );
    },
  };
}

/** A copy of `tensors` in memory, changed by `change`. */
async function changed(
  tensors: TensorSource,
  change: (stored: Record<string, Stored>) => void,
): Promise<TensorSource> {
  const stored: Record<string, Stored> = {};
  for (const name of tensors.names()) {
    const { dtype, shape, bytes } = tensors.info(name);
    stored[name] = { dtype, shape, data: await tensors.read(name, 0, bytes) };
  }
  change(stored);
  return source(stored);
}

Deno.test("float16, bfloat16 and float32 weights of equal values are the same matrix", () =>
  withGpu(async (gpu) => {
    const [n, k] = [24, 40];
    // Few mantissa bits, so that bfloat16 holds them too.
    const values = Float32Array.from({ length: n * k }, (_, i) => ((i * 37) % 255 - 127) / 64);
    const float16 = new Uint16Array(new Float16Array(values).buffer);
    const bfloat16 = new Uint16Array(new Uint16Array(values.buffer).filter((_, i) => i % 2 === 1));
    const outputs: Float32Array[] = [];
    for (
      const [dtype, data] of [["F16", float16], ["BF16", bfloat16], ["F32", values]] as const
    ) {
      const tensors = source({ "w.weight": { dtype, shape: [n, k], data } });
      const matrix = await loadMatrix(gpu, tensors, "w", [n, k], null);
      outputs.push(
        await runLinear(gpu, {
          matrix,
          x: bitsOf(randomActivations(k, 1)),
          shape: stepShape(1),
          ranges: ["decode"],
        }),
      );
    }
    assertEquals(outputs[1], outputs[0]);
    assertEquals(outputs[2], outputs[0]);
    assert(outputs[0].some((value) => value !== 0));
  }));

Deno.test("a matrix that a quantized checkpoint left dense is dense", () =>
  withGpu(async (gpu) => {
    const tensors = randomTensors("w", [16, 64], null, 1);
    const matrix = await loadMatrix(gpu, tensors, "w", [16, 64], FORMAT);
    assertEquals(matrix.format, null);
  }));

Deno.test("matrixBytes() foretells what a matrix takes on the GPU", () =>
  withGpu(async (gpu) => {
    for (
      const format of [
        null,
        FORMAT,
        { m: 2, v: 8, g: 64, b: 8 },
        { m: 1, v: 8, g: ROW_SCALE, b: 16 },
      ]
    ) {
      const shape = [300, 320] as const;
      const matrix = await loadMatrix(
        gpu,
        randomTensors("w", shape, format, 1),
        "w",
        shape,
        format,
      );
      assertEquals(matrix.bytes, matrixBytes(shape, format));
      matrix.destroy();
    }
  }));

Deno.test("loadMatrix() refuses values that float16 cannot hold, and names the tensor", () =>
  withGpu(async (gpu) => {
    const shape = [8, 64] as const;
    const dense = (data: ArrayBufferView<ArrayBuffer>, dtype: DType) =>
      loadMatrix(gpu, source({ "w.weight": { dtype, shape: [...shape], data } }), "w", shape, null);
    for (const bad of [NaN, Infinity, -1e6]) {
      const data = new Float32Array(8 * 64);
      data[400] = bad;
      const error = await assertRejects(() => dense(data, "F32"), FleetError, "w.weight");
      assertEquals(error.code, "bad-checkpoint");
    }
    const large = new Uint16Array(8 * 64);
    large[7] = 0x7f00; // 1.7e38 in bfloat16
    await assertRejects(() => dense(large, "BF16"), FleetError, "w.weight");
    large[7] = 0x7c00;
    await assertRejects(() => dense(large, "F16"), FleetError, "w.weight");

    for (const tensor of ["w.scales", "w.codebooks"]) {
      const tensors = await changed(randomTensors("w", shape, FORMAT, 1), (stored) => {
        new Uint16Array(stored[tensor].data.buffer)[3] = 0x7e00;
      });
      await assertRejects(() => loadMatrix(gpu, tensors, "w", shape, FORMAT), FleetError, tensor);
    }
  }));

Deno.test("loadMatrix() refuses tensors that are missing or do not match the config", () =>
  withGpu(async (gpu) => {
    const shape = [8, 64] as const;
    const good = randomTensors("w", shape, FORMAT, 1);
    const refuses = async (
      change: (stored: Record<string, Stored>) => void,
      includes: string,
      format: CodeGemmFormat = FORMAT,
    ) => {
      const tensors = await changed(good, change);
      const error = await assertRejects(
        () => loadMatrix(gpu, tensors, "w", shape, format),
        FleetError,
        includes,
      );
      assertEquals(error.code, "bad-checkpoint");
    };
    const nothing = () => {};
    await refuses((stored) => delete stored["w.scales"], "w.scales");
    await refuses((stored) => stored["w.codes"].shape = [1, 4, 9], "w.codes");
    await refuses((stored) => stored["w.codes"].dtype = "I8", "w.codes");
    await refuses((stored) => stored["w.codebooks"].dtype = "F32", "w.codebooks");
    await refuses(nothing, "w.codes", { ...FORMAT, m: 2 });
    await refuses(nothing, "codes of 4 bits", { ...FORMAT, b: 4 });
    await refuses(nothing, "no multiple of 4 v = 128", { ...FORMAT, v: 32, g: 32 });
    await refuses(nothing, "no multiple of v = 4", { ...FORMAT, g: 30 });
    await refuses(nothing, "no multiple of g = 128", { ...FORMAT, g: 128 });
    await refuses(nothing, "positive integer", { ...FORMAT, v: 0 });
    await assertRejects(
      () => loadMatrix(gpu, good, "other", shape, FORMAT),
      FleetError,
      "other.weight",
    );
  }));

Deno.test("loadMatrix() says when one row block is larger than a binding", () =>
  withGpu(async (gpu) => {
    const error = await assertRejects(
      () =>
        loadMatrix(gpu, randomTensors("w", [8, 64], null, 1), "w", [8, 64], null, {
          maxBindingBytes: 1024,
        }),
      FleetError,
      "storage bindings",
    );
    assertEquals(error.code, "out-of-memory");
  }));

Deno.test("random tensors read the same in any slices", async () => {
  const tensors = randomTensors("w", [8, 64], FORMAT, 7);
  for (const name of tensors.names()) {
    const { bytes } = tensors.info(name);
    const whole = await tensors.read(name, 0, bytes);
    const parts = [await tensors.read(name, 0, 8), await tensors.read(name, 8, bytes - 8)];
    assertEquals(whole, new Uint8Array([...parts[0], ...parts[1]]));
  }
});
