import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { FleetError } from "../../shared/errors.ts";
import { heldMemory, Recorder } from "./operation.ts";
import { rowwise } from "./rows.ts";
import { withRecorder } from "./testing.ts";

Deno.test("a buffer that no kernel could bind is refused with its name and sizes", () =>
  withRecorder((recorder) => {
    const most = recorder.gpu.limits.maxStorageBufferBindingSize;
    const error = assertThrows(
      () => recorder.buffer("gate | up", most / 4 + 4),
      FleetError,
      "gate | up takes",
    );
    assertEquals(error.code, "out-of-memory");
    assertStringIncludes(error.message, `allows ${(most / 2 ** 30).toFixed(2)} GiB`);
    return Promise.resolve();
  }));

Deno.test("recorders of a GPU add up what they hold, now and at its most", () =>
  withRecorder((first) => {
    const memory = heldMemory(first.gpu), before = memory.bytes;
    const second = new Recorder(first.gpu);
    first.buffer("a", 1000);
    second.buffer("b", 500);
    assertEquals(memory.bytes, before + 6000);
    second.destroy();
    second.destroy();
    assertEquals([memory.bytes, memory.peakBytes], [before + 4000, before + 6000]);
    return Promise.resolve();
  }));

Deno.test("work that is cut into submissions is done in order, copies in between", () =>
  withRecorder(async (recorder) => {
    const x = recorder.upload("x", Float32Array.of(1, 2, 3, 4)), twice = recorder.buffer("2 x", 4);
    const double = await rowwise(recorder, "add", [x, x, twice], { columns: 4, value: 1 });
    const back = recorder.copy(twice, x, 4);
    const heavy = { ...double, work: 3e12 };
    recorder.run([heavy, back, heavy, back, heavy, back, heavy, back]);
    await recorder.settle();
    assertEquals(await recorder.floats(x, 4), Float32Array.of(16, 32, 48, 64));
  }));
