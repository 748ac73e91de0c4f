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
  /** Throws where nobody catches. */
  die: { args: null; result: never };
};

serveThread<TestCalls>({
  double: ({ bytes }, { transfer }) => {
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
  die: () => {
    setTimeout(() => {
      throw new Error("on purpose");
    }, 0);
    return new Promise<never>(() => {});
  },
});
