import { assertEquals, assertThrows } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import type { StepBatch } from "../shared/frames.ts";
import { checkBatch } from "./check_batch.ts";
import type { StageSpec } from "./stage_spec.ts";
import { stepBatch } from "./stage_chain.ts";
import { tinyConfig } from "./testing/random_model.ts";

const SPEC: StageSpec = {
  config: tinyConfig(),
  from: 0,
  to: 3,
  first: true,
  last: true,
  limits: { maxRows: 6, maxSequences: 2, maxOutputs: 2, pages: 8, contextTokens: 96 },
  profile: { version: 1, decode: "codegemm" },
};

/** A decode row of sequence 1, then prefill rows of both sequences. */
function goodBatch(): StepBatch {
  return stepBatch([Uint32Array.of(3, 7), Uint32Array.of(0, 1, 2)], [
    { sequence: 1, position: 95, token: 100, request: { type: "score", token: 3 } },
    { sequence: 0, position: 0, token: 5 },
    { sequence: 0, position: 1, token: 6, request: { type: "logits" } },
    { sequence: 1, position: 94, token: 7 },
  ], 1);
}

Deno.test("a batch within the limits passes", () => {
  checkBatch(SPEC, goodBatch(), null);
  checkBatch({ ...SPEC, first: false }, goodBatch(), new Uint16Array(4 * 64));
});

const BAD: Record<string, [change: (batch: StepBatch) => void, says: string]> = {
  "no rows": [(batch) => {
    batch.rowToken = new Uint32Array();
  }, "no rows"],
  "more rows than the limit": [(batch) => {
    batch.rowToken = new Uint32Array(7);
  }, "7 rows, at most 6"],
  "arrays of different lengths": [(batch) => {
    batch.rowPosition = new Uint32Array(3);
  }, "disagree"],
  "more sequences than the limit": [(batch) => {
    batch.sequences.push({ pages: Uint32Array.of(4) });
  }, "3 sequences, at most 2"],
  "more decode rows than rows": [(batch) => {
    batch.decodeRows = 5;
  }, "5 decode rows, at most 4"],
  "a page that does not exist": [(batch) => {
    batch.sequences[0].pages[1] = 8;
  }, "page 8 is not below 8"],
  "a first page that does not exist": [(batch) => {
    batch.sequences[1].pages[0] = 2 ** 32 - 1;
  }, "page 4294967295 is not below 8"],
  "a page table longer than the context": [(batch) => {
    batch.sequences[1].pages = new Uint32Array(4);
  }, "4 pages of a sequence, at most 3"],
  "a page table that does not cover a position": [(batch) => {
    batch.sequences[1].pages = Uint32Array.of(0, 1);
  }, "beyond a page table of 64"],
  "a position beyond the context": [(batch) => {
    batch.rowPosition[0] = 96;
  }, "position 96 is not below 96"],
  "a sequence that is not there": [(batch) => {
    batch.rowSequence[3] = 2;
  }, "sequence 2 is not below 2"],
  "a token beyond the vocabulary": [(batch) => {
    batch.rowToken[0] = 101;
  }, "token 101 is not below 101"],
  "rows of a sequence that fall": [(batch) => {
    batch.rowPosition[1] = 2;
  }, "do not rise"],
  "a position written by a decode and by a prefill row": [(batch) => {
    batch.rowPosition[3] = 95;
  }, "comes twice"],
  "a request for a row that is not there": [(batch) => {
    batch.requests[1].row = 4;
  }, "requested row 4"],
  "requests out of order": [(batch) => {
    batch.requests.reverse();
  }, "not in the order"],
  "more requests than the limit": [(batch) => {
    batch.requests.push({ type: "logits", row: 3 });
  }, "3 requests, at most 2"],
  "a scored token beyond the vocabulary": [(batch) => {
    batch.requests[0] = { type: "score", row: 0, token: 101 };
  }, "scored token 101"],
};

for (const [what, [change, says]] of Object.entries(BAD)) {
  Deno.test(`refuses ${what}`, () => {
    const batch = goodBatch();
    change(batch);
    const error = assertThrows(() => checkBatch(SPEC, batch, null), FleetError, says);
    assertEquals(error.code, "bad-frame");
  });
}

Deno.test("refuses activations of the wrong size, that are not finite, missing, or where none belong", () => {
  const later = { ...SPEC, first: false };
  const check = (spec: StageSpec, hidden: Uint16Array | null) => () =>
    checkBatch(spec, goodBatch(), hidden);
  assertThrows(check(SPEC, new Uint16Array(256)), FleetError, "takes no activations");
  assertThrows(check(later, null), FleetError, "0 activations where 256 belong");
  assertThrows(check(later, new Uint16Array(255)), FleetError, "255 activations");
  for (const notFinite of [0x7c00, 0xfc00, 0x7e01]) {
    for (const at of [0, 1, 200, 254, 255]) {
      for (const offset of [0, 2]) {
        const hidden = new Uint16Array(new ArrayBuffer(516), offset, 256).fill(0xfbff);
        assertEquals(check(later, hidden)(), undefined);
        hidden[at] = notFinite;
        assertThrows(check(later, hidden), FleetError, `activation ${at} is not a finite number`);
      }
    }
  }
});
