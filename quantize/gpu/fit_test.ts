import { assert, assertAlmostEquals, assertLess } from "@std/assert";
import { Gpu } from "../../kernels/gpu.ts";
import { gaussian, seededRandom } from "../../shared/random.ts";
import { VirtualClock } from "../../shared/clock.ts";
import { trainCodebooks } from "../codebooks.ts";
import { Stopwatch } from "../phases.ts";
import { fitMatrix } from "./fit.ts";
import { Recorder } from "./operation.ts";

const N = 24, K = 64, FORMAT = { m: 1, v: 4, g: 16, b: 8 };

Deno.test("fitting lowers the weighted error, with the Hessian whole or in bands", async () => {
  const random = seededRandom(4);
  const weights = Float32Array.from({ length: N * K }, () => gaussian(random));
  // Inputs of few directions: neighbours move together.
  const hessian = new Float32Array(K * K);
  for (let sample = 0; sample < 40; sample++) {
    let last = 0;
    const x = Array.from({ length: K }, () => last = 0.9 * last + 0.4 * gaussian(random));
    for (let i = 0; i < K; i++) for (let j = 0; j < K; j++) hessian[i * K + j] += x[i] * x[j];
  }
  for (let i = 0; i < K; i++) hessian[i * K + i] += 0.4;
  const gpu = await Gpu.open({ software: true, limits: "default" });
  const recorder = new Recorder(gpu);
  try {
    const books = trainCodebooks(weights, FORMAT, { rounds: 1 }, random);
    const fit = (cuts: [number, number][], fitRounds: number) =>
      fitMatrix(
        gpu,
        weights,
        [N, K],
        cuts.map(([first, rows]) => ({
          buffer: recorder.upload("hessian", hessian.slice(first * K, (first + rows) * K)),
          first,
          rows,
        })),
        books,
        FORMAT,
        { fitRounds, fitSteps: 10 },
        new Stopwatch(new VirtualClock()),
      );
    const whole = await fit([[0, K]], 2);
    const none = await fit([[0, K]], 0);
    assert(none.errorAfter === none.errorBefore && none.errorBefore === whole.errorBefore);
    assertLess(whole.errorAfter, 0.6 * whole.errorBefore);
    const cut = await fit([[0, 48], [48, 16]], 2);
    assertAlmostEquals(cut.errorBefore, whole.errorBefore, 1e-4);
    assertAlmostEquals(cut.errorAfter, whole.errorAfter, 0.01 * whole.errorAfter);
  } finally {
    recorder.destroy();
    gpu.close();
  }
});
