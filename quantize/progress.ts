/**
 * What a quantization tells while it goes on, as lines that people read: what is done, and how long the
 * rest will take.
 *
 * @module
 */
import type { Clock } from "../shared/clock.ts";
import type { CalibratedRun } from "./calibrated.ts";

/** Time between two lines about looking through the weights. */
const CHECK_LINE_MS = 10_000;

/** Seconds as people read them: `50 s`, `12 min`, `4.0 h`. */
export function duration(seconds: number): string {
  if (seconds < 600) return `${seconds.toFixed(0)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/**
 * Listeners of a run that print its progress.
 *
 * What is left is told from what this run has done itself: blocks and steps of an earlier one, which was
 * cut short, took none of its time.
 *
 * @param parts tells also what each part of a block took
 */
export function progressLines(
  clock: Clock,
  print: (line: string) => void,
  { parts }: { parts: boolean },
): Required<Pick<CalibratedRun, "onCheck" | "onPart" | "onBlock" | "onStep">> {
  const startMs = clock.nowMs();
  let lineMs = startMs, blocksMs = 0, blocks = 0;
  let firstStep: { step: number; ms: number } | null = null;
  return {
    onCheck(doneBytes, totalBytes) {
      const nowMs = clock.nowMs();
      if (nowMs - lineMs < CHECK_LINE_MS) return;
      lineMs = nowMs;
      const left = (nowMs - startMs) / 1000 * (totalBytes / doneBytes - 1);
      const share = (100 * doneBytes / totalBytes).toFixed(0);
      print(`weights looked through: ${share} %, ${duration(left)} to go`);
    },
    onPart(layer, what, seconds) {
      if (parts) print(`block ${layer + 1}: ${what}, ${seconds.toFixed(1)} s`);
    },
    onBlock({ matrices, outputError, seconds }, done, total) {
      blocks++;
      blocksMs += 1000 * seconds;
      const percent = (share: number) => `${(100 * share).toFixed(2)} %`;
      const mean = (errors: number[]) => percent(errors.reduce((a, b) => a + b) / errors.length);
      const fitted = matrices.length === 0
        ? "all kept in float16"
        : `weighted error ${mean(matrices.map((matrix) => matrix.errorBefore))} -> ` +
          mean(matrices.map((matrix) => matrix.errorAfter));
      print(
        `block ${done}/${total}: ${fitted}, output ${percent(outputError)}, ${
          seconds.toFixed(1)
        } s, blocks: ${duration(blocksMs / 1000 / blocks * (total - done))} to go`,
      );
    },
    onStep(done, total, divergence) {
      const nowMs = clock.nowMs();
      firstStep ??= { step: done, ms: nowMs };
      const each = done > firstStep.step ? (nowMs - firstStep.ms) / (done - firstStep.step) : null;
      const pace = each === null
        ? ""
        : `, ${each.toFixed(0)} ms a step, ${duration(each * (total - done) / 1000)} to go`;
      print(`step ${done}/${total}: divergence ${divergence.toFixed(4)}${pace}`);
    },
  };
}
