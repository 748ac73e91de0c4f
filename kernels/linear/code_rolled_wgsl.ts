/**
 * WGSL of the CodeGEMM decode kernels for software adapters: the same sums in loops, because
 * compiling the unrolled kernels for a CPU takes many seconds each.
 *
 * A chain here begins with a multiply-add onto zero where the unrolled kernels begin with a product:
 * the same bits, but for the sign of a zero, which the float32 accumulator loses.
 *
 * @module
 */
import { codesPerWord } from "../../shared/model_config.ts";
import type { CodeBody, CodeKernel } from "./code_kernel.ts";
import { loadActivations, psumbooksPerStage, splat, sumVariables } from "./code_kernel.ts";
import { centroidCount, codeWidth } from "./code_words_wgsl.ts";
import { FLOAT16_PAIR_K } from "./order.ts";
import type { BatchLanes } from "./wgsl.ts";
import { times } from "./wgsl.ts";

/** Psumbooks of as many positions as fit are made in workgroup memory, then gathered from. */
export function rolledPsumbook(kernel: CodeKernel, lanes: BatchLanes): CodeBody {
  const { format: { m, v }, order, threads, rowsPerThread, turnPositions } = kernel;
  const stage = psumbooksPerStage(kernel);
  const type16 = lanes.type("f16");
  const type32 = lanes.type("f32");
  const zero = `${type16}(0.0)`;
  const inRegisters = Math.min(v, 8);
  const multiply = (chain: string, e: string, centroid: string) =>
    times(
      lanes.vectors,
      (j) =>
        `            ${chain}${j} = fma(activations${j}[from_x + ${e}], ${
          splat(lanes, "f16", centroid)
        }, ${chain}${j});`,
    );
  const fill = `
      for (var c = lane; c < 256u; c += ${threads}u) {
        for (var k = 0u; k < ${m}u; k++) {
          let centroid = ((book * ${m}u + k) * 256u + c) * ${v}u;
${times(inRegisters, (e) => `          let c${e} = codebooks[centroid + ${e}u];`)}
          // The stage's entries of codebook k.
          for (var entry = stage + (k + ${m}u - stage % ${m}u) % ${m}u; entry < stage_end; entry += ${m}u) {
            let from_x = (entry / ${m}u) * ${v}u;
${
    times(lanes.vectors, (j) =>
      `            var even${j} = ${zero}; var odd${j} = ${zero}; var sum${j} = ${type32}(0.0);`)
  }
${times(inRegisters, (e) => multiply(e % 2 === 0 ? "even" : "odd", `${e}u`, `c${e}`))}
${
    v === inRegisters ? "" : `            for (var e = ${inRegisters}u; e < ${v}u; e++) {
              let rest = codebooks[centroid + e];
              // A vector longer than the float16 bound is closed in between.
              if (e % 16u == 0u) {
${
      times(
        lanes.vectors,
        (j) =>
          `                sum${j} += ${type32}(even${j} + odd${j}); even${j} = ${zero}; odd${j} = ${zero};`,
      )
    }
              }
              if (e % 2u == 0u) {
${multiply("even", "e", "rest")}
              } else {
${multiply("odd", "e", "rest")}
              }
            }`
  }
${
    times(lanes.vectors, (j) =>
      `            book${j}[(entry - stage) * 256u + c] = ${type16}(sum${j} + ${type32}(even${j} + odd${j}));`)
  }
          }
        }
      }`;
  const turn = `
    ${loadActivations(kernel, lanes, "")}
    for (var stage = 0u; stage < ${turnPositions * m}u; stage += ${stage}u) {
      let stage_end = min(stage + ${stage}u, ${turnPositions * m}u);
      // The last stage's gathers are done, and the activations are there.
      workgroupBarrier();
${fill}
      workgroupBarrier();
      for (var entry = stage; entry < stage_end; entry++) {
        let position = entry / ${m}u;
        let opens = position % ${order.groupPositions}u == 0u && entry % ${m}u == 0u;
        let closes = (position + 1u) % ${order.groupPositions}u == 0u && entry % ${m}u == ${m - 1}u;
${
    times(rowsPerThread / 4, (t) =>
      `        let at${t} = ${
        codesOf(kernel, `entry % ${m}u`, t)
      } + vec4<u32>((entry - stage) * 256u);`)
  }
        if (opens) {
${times(rowsPerThread, (r) => times(lanes.vectors, (j) => `          sum${r}_${j} = ${zero};`))}
        }
${
    times(rowsPerThread, (r) =>
      times(lanes.vectors, (j) =>
        `        sum${r}_${j} += book${j}[at${r >> 2}.${"xyzw"[r & 3]}];`))
  }
        if (closes) {
${addGroups(kernel, lanes, (r, j) => `${type32}(sum${r}_${j})`)}
        }
      }
    }`;
  return {
    declarations: times(
      lanes.vectors,
      (j) =>
        `var<workgroup> book${j}: array<${lanes.type("f16")}, ${stage * 256}>;\n` +
        `var<workgroup> activations${j}: array<${lanes.type("f16")}, ${turnPositions * v}>;`,
    ),
    prologue: sumVariables(kernel, lanes),
    turn,
  };
}

/** A code gathers its centroid, which is multiplied with the activations. */
export function rolledDequantize(kernel: CodeKernel, lanes: BatchLanes): CodeBody {
  const { format, order, rowsPerThread, turnPositions } = kernel;
  const { m, v } = format;
  const { groupPositions } = order.dequantize;
  const entries = centroidCount(format);
  const count = turnPositions * v;
  const type32 = lanes.type("f32");
  const zero = `${lanes.type("f16")}(0.0)`;
  const turn = `
    let half = (turn & 1u) * ${count}u;
    ${loadActivations(kernel, lanes, "half + ")}
    // One barrier is enough: a half is written again only after everyone passed the next barrier.
    workgroupBarrier();
    for (var position = 0u; position < ${turnPositions}u; position++) {
      let opens = position % ${groupPositions}u == 0u;
      let closes = (position + 1u) % ${groupPositions}u == 0u;
${
    times(m, (k) =>
      times(rowsPerThread / 4, (t) =>
        `      let at${k}_${t} = (${codesOf(kernel, `${k}u`, t)} + vec4<u32>(${
          k * entries
        }u + book * ${m * entries}u)) * ${v}u;`))
  }
      for (var e = 0u; e < ${v}u; e++) {
        if ((opens && e == 0u) || (e > 0u && e % ${FLOAT16_PAIR_K}u == 0u)) {
${
    times(rowsPerThread, (r) =>
      times(lanes.vectors, (j) =>
        `          even${r}_${j} = ${zero}; odd${r}_${j} = ${zero};`))
  }
        }
        let is_odd = ((position % ${groupPositions}u) * ${v}u + e) % 2u == 1u;
${times(lanes.vectors, (j) => `        let a${j} = activations${j}[half + position * ${v}u + e];`)}
${
    times(rowsPerThread, (r) => {
      const centroids = Array.from(
        { length: m },
        (_, k) => `codebooks[at${k}_${r >> 2}.${"xyzw"[r & 3]} + e]`,
      );
      return `        { let c = ${splat(lanes, "f16", centroids.join(" + "))};\n` +
        times(
          lanes.vectors,
          (j) =>
            `          if (is_odd) { odd${r}_${j} = fma(a${j}, c, odd${r}_${j}); } ` +
            `else { even${r}_${j} = fma(a${j}, c, even${r}_${j}); }`,
        ) + " }";
    })
  }
        // A vector longer than the float16 bound is closed in between.
        if (
          (closes && e == ${v - 1}u) ||
          (e % ${FLOAT16_PAIR_K}u == ${FLOAT16_PAIR_K - 1}u && e < ${v - 1}u)
        ) {
${addGroups(kernel, lanes, (r, j) => `${type32}(even${r}_${j}) + ${type32}(odd${r}_${j})`)}
        }
      }
    }`;
  return {
    declarations: times(
      lanes.vectors,
      (j) => `var<workgroup> activations${j}: array<${lanes.type("f16")}, ${2 * count}>;`,
    ),
    prologue: ["even", "odd"].map((name) => sumVariables(kernel, lanes, name)).join("\n"),
    turn,
  };
}

/** The codes of row quad `t` at `position`, as `vec4<u32>`. */
function codesOf(kernel: CodeKernel, codebook: string, t: number): string {
  const { turnPositions, format, order, threads } = kernel;
  const perWord = codesPerWord(format);
  const word =
    `(turn_at * ${turnPositions / perWord}u + position / ${perWord}u) * ${format.m}u + ` +
    codebook;
  return `((codes[(${word}) * ${order.rowBlock / 4}u + quad + ${t * threads}u] >> vec4<u32>(${
    codeWidth(format)
  }u * (position % ${perWord}u))) & vec4<u32>(${centroidCount(format) - 1}u))`;
}

/** Every row's group, with the scale at `position`; `sum` is WGSL of it in float32. */
function addGroups(
  kernel: CodeKernel,
  lanes: BatchLanes,
  sum: (r: number, j: number) => string,
): string {
  const { turnPositions, rowsPerThread, threads, order } = kernel;
  return `          let scale_at = (scale_block + (turn * ${turnPositions}u + position) / ${order.scalePositions}u) * ${
    order.rowBlock / 4
  }u + quad;\n` +
    times(
      rowsPerThread / 4,
      (t) => `          let scale${t} = vec4<f32>(scales[scale_at + ${t * threads}u]);`,
    ) +
    "\n" +
    times(
      rowsPerThread,
      (r) =>
        times(
          lanes.vectors,
          (j) => {
            const scale = splat(lanes, "f32", `scale${r >> 2}.${"xyzw"[r & 3]}`);
            return `          acc${r}_${j} = fma(${scale}, ${sum(r, j)}, acc${r}_${j});`;
          },
        ),
    );
}
