import { assertAlmostEquals, assertEquals, assertLess } from "@std/assert";
import { gaussian, seededRandom } from "../../shared/random.ts";
import { Adam } from "./adam.ts";
import { half } from "./half.ts";
import { withRecorder } from "./testing.ts";
import { dotProduct, rowwise } from "./rows.ts";

const random = seededRandom(6);
const normal = (count: number) => Float32Array.from({ length: count }, () => gaussian(random));

Deno.test("distillation: losses and gradient agree with plain loops and finite differences", () =>
  withRecorder(async (recorder) => {
    const rows = 3, vocab = 300, share = 0.25, next = [7, -1, 299];
    const teacher = normal(rows * vocab), student = normal(rows * vocab);
    const logits = recorder.upload("student", student);
    const losses = recorder.buffer("losses", 2 * rows);
    recorder.run([
      await rowwise(recorder, "distill", [
        recorder.upload("teacher", teacher),
        recorder.upload("next", Float32Array.from(next)),
        logits,
        losses,
      ], { rows, columns: vocab, value: share }),
    ]);
    const logs = (all: Float32Array | Float64Array, row: number) => {
      const part = Float64Array.from(all.subarray(row * vocab, (row + 1) * vocab));
      const sum = part.reduce((sum, value) => sum + Math.exp(value), 0);
      return part.map((value) => value - Math.log(sum));
    };
    /** What is minimized for a row, and its two parts. */
    const loss = (all: Float32Array | Float64Array, row: number) => {
      const ours = logs(all, row), theirs = logs(teacher, row);
      let divergence = 0;
      theirs.forEach((log, i) => divergence += Math.exp(log) * (log - ours[i]));
      const nextToken = next[row] < 0 ? 0 : -ours[next[row]];
      const part = next[row] < 0 ? 0 : share;
      return { divergence, nextToken, all: (1 - part) * divergence + part * nextToken };
    };
    const measured = await recorder.floats(losses, 2 * rows);
    const gradient = await recorder.floats(logits, rows * vocab);
    for (let row = 0; row < rows; row++) {
      const expected = loss(student, row);
      assertAlmostEquals(measured[2 * row], expected.divergence, 1e-4);
      assertAlmostEquals(measured[2 * row + 1], expected.nextToken, 1e-4);
      for (const i of [0, 7, 255, 299]) {
        const moved = (by: number) => {
          const all = Float64Array.from(student);
          all[row * vocab + i] += by;
          return loss(all, row).all;
        };
        const slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
        assertAlmostEquals(gradient[row * vocab + i], slope, 1e-5);
      }
    }
  }));

Deno.test("differences, embedding, damping and inner products are what they say", () =>
  withRecorder(async (recorder) => {
    const rows = 5, columns = 70, a = normal(rows * columns), b = normal(rows * columns);
    const [left, right] = [recorder.upload("a", a), recorder.upload("b", b)];
    const by = recorder.buffer("difference", rows * columns);
    const sums = recorder.buffer("sums", 2 * rows);
    const picked = recorder.buffer("picked", 3 * columns);
    const square = normal(8), damped = recorder.upload("square", square);
    recorder.run([
      await rowwise(recorder, "difference", [left, right, by, sums], { rows, columns }),
      await rowwise(recorder, "embed", [
        left,
        recorder.upload("ids", Float32Array.of(4, 0, 4)),
        picked,
      ], { rows: 3, columns }),
      // The lower two rows of a square of 4.
      await rowwise(recorder, "damp", [damped], {
        rows: 2,
        columns: 4,
        extra: 2,
        value: 0.5,
        workgroups: [1],
      }),
    ]);
    assertEquals(await recorder.floats(by, a.length), a.map((value, i) => value - b[i]));
    const measured = await recorder.floats(sums, 2 * rows);
    for (let row = 0; row < rows; row++) {
      let error = 0, norm = 0;
      for (let i = row * columns; i < (row + 1) * columns; i++) {
        error += (a[i] - b[i]) ** 2;
        norm += b[i] ** 2;
      }
      assertAlmostEquals(measured[2 * row], error, 1e-4 * error);
      assertAlmostEquals(measured[2 * row + 1], norm, 1e-4 * norm);
    }
    const chosen = await recorder.floats(picked, 3 * columns);
    assertEquals(chosen.subarray(columns, 2 * columns), a.subarray(0, columns));
    assertEquals(chosen.subarray(2 * columns), a.subarray(4 * columns));
    const mean = (square[2] + square[7]) / 2;
    const after = await recorder.floats(damped, 8);
    square.forEach((value, i) =>
      assertAlmostEquals(after[i], value + (i === 2 || i === 7 ? mean / 2 : 0), 1e-6)
    );
    const dot = a.reduce((sum, value, i) => sum + value * b[i], 0);
    assertAlmostEquals(await dotProduct(recorder, left, right, a.length), dot, 1e-3);
  }));

Deno.test("float16 packs as it rounds, saturates, and comes back", () =>
  withRecorder(async (recorder) => {
    const values = Float32Array.of(1, -2.5, 0.1, 70000, -1e9, 0, 3.14159, 65504);
    const floats = recorder.upload("floats", values), halves = recorder.buffer("halves", 4);
    const back = recorder.buffer("back", 8);
    recorder.run([
      await half(recorder, "pack", floats, halves, 8),
      await half(recorder, "unpack", back, halves, 8),
    ]);
    const expected = values.map((value) => Math.f16round(Math.max(-65504, Math.min(65504, value))));
    assertEquals(await recorder.floats(back, 8), expected);
  }));

Deno.test("Adam takes the steps of its definition, on its schedule", () =>
  withRecorder(async (recorder) => {
    const count = 300, steps = 40, start = normal(count), gradient = normal(count + 8);
    const adam = new Adam(recorder), parameters = recorder.upload("parameters", start);
    const slope = recorder.upload("gradient", gradient);
    const update = await adam.update(parameters, slope, count, 0.01, 8);
    const expected = Float64Array.from(start);
    const moments = { first: new Float64Array(count), second: new Float64Array(count) };
    for (let t = 0; t < 3; t++) {
      adam.begin(t, steps);
      recorder.run([update]);
      const rate = 0.01 * Math.min(1, (t + 1) / 2) *
        (0.02 + 0.98 * (1 + Math.cos(Math.PI * t / steps)) / 2);
      for (let i = 0; i < count; i++) {
        const g = gradient[8 + i];
        moments.first[i] = 0.9 * moments.first[i] + 0.1 * g;
        moments.second[i] = 0.98 * moments.second[i] + 0.02 * g * g;
        expected[i] -= rate * moments.first[i] / (1 - 0.9 ** (t + 1)) /
          Math.sqrt(moments.second[i] / (1 - 0.98 ** (t + 1)));
      }
    }
    const actual = await recorder.floats(parameters, count);
    actual.forEach((value, i) => assertLess(Math.abs(value - expected[i]), 1e-5));
  }));
