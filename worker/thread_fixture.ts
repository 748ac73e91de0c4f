/**
 * A thread for the tests of `thread.ts`.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";
import { serveThread } from "./thread.ts";

/** What it can do. */
export type TestCalls = {
  /** Doubles every byte, in place; buffers move both ways. */
  double: { args: { bytes: Uint8Array<ArrayBuffer> }; result: Uint8Array<ArrayBuffer> };
  /** Counts until aborted. */
  count: { args: null; result: string; note: number };
  refuse: { args: { reason: string }; result: never };
  /** Blocks the thread for its next message, in vain for at most `ms`; how often and how long. */
  wait: {
    args: { ms: number };
    result: { waits: number; ms: number; doubled: number };
    note: null;
  };
  /** Throws where nobody catches. */
  die: { args: null; result: never };
};

let doubled = 0;

const mailbox = serveThread<TestCalls>({
  double: ({ bytes }, { transfer }) => {
    doubled++;
    for (let i = 0; i < bytes.length; i++) bytes[i] *= 2;
    transfer.push(bytes.buffer);
    return bytes;
  },
  count: (_, { tell, signal }) =>
    new Promise((resolve) => {
      let count = 0;
      const timer = setInterval(() => tell(++count), 1);
      signal.addEventListener("abort", () => {
        clearInterval(timer);
        resolve("aborted");
      });
    }),
  refuse: ({ reason }) => {
    throw new FleetError("disk", reason);
  },
  async wait({ ms }, { tell }) {
    const fromMs = performance.now(), before = doubled;
    const passedMs = () => performance.now() - fromMs;
    await mailbox.wait(0);
    tell(null);
    let waits = 0;
    while (doubled === before && passedMs() < ms) {
      await mailbox.wait(ms - passedMs());
      waits++;
    }
    return { waits, ms: passedMs(), doubled: doubled - before };
  },
  die: () => {
    setTimeout(() => {
      throw new Error("on purpose");
    }, 0);
    return new Promise<never>(() => {});
  },
});
