/**
 * WGSL of where a thread of the decode kernels of 8-bit codes stands in N and in K, and of the code words and
 * scales of its rows: loaded by fours of N, since that is how they lie side by side.
 *
 * @module
 */
import { type CodeGemmFormat, codesPerWord } from "../../shared/model_config.ts";
import { type CodeOrder, gcd } from "./order.ts";
import { times } from "./wgsl.ts";
import { splitPositions, type WorkgroupShare } from "./workgroup_share.ts";

/** What of a kernel decides where its threads stand, and what they load at a turn. */
export interface ThreadRows {
  format: CodeGemmFormat;
  order: CodeOrder;
  /** Rows of N a thread holds, a multiple of 4. */
  rowsPerThread: number;
  /** Positions of a turn. */
  turnPositions: number;
}

/**
 * Declares fours of rows of N: `quads`, all of them; `quad`, the workgroup's first; `quad<t>`, those of
 * this thread. Then `book`, the workgroup's matrix of a stack, and for each four where its code words
 * and its scales begin, `words<t>` and `scales<t>`.
 *
 * @param lanes threads side by side along N
 * @param lane WGSL of this thread's place among them, a u32
 */
export function threadRowsWgsl(kernel: ThreadRows, lanes: number, lane: string): string {
  const { format, order, rowsPerThread } = kernel;
  const rowQuads = order.rowBlock / 4;
  const wordK = codesPerWord(format) * format.v;
  const scaleK = order.scalePositions * format.v;
  return `  // Rows of N in fours: those of the workgroup, those of this thread, and where their codes stand.
  let quads = (params.n + ${order.rowBlock - 1}u) / ${order.rowBlock}u * ${rowQuads}u;
  let quad = workgroup.x * ${lanes * rowsPerThread / 4}u;
  let book = book_of(min(quad, quads - 1u) / ${rowQuads}u);
${
    times(rowsPerThread / 4, (t) => {
      const block = `quad${t} / ${rowQuads}u`;
      const place = `quad${t} % ${rowQuads}u`;
      return `  let quad${t} = min(quad + ${t * lanes}u + ${lane}, quads - 1u);
  let words${t} = ${block} * (params.k / ${wordK}u) * ${format.m * rowQuads}u + ${place};
  let scales${t} = ${block} * (params.k / ${scaleK}u) * ${rowQuads}u + ${place};`;
    })
  }`;
}

/**
 * Calls `body` for each vector of a thread's code words in a turn: with its name
 * `<word>_<codebook>_<four>`, its line among those of the turn, and its four of the thread's.
 */
export function eachWord(
  { format, turnPositions, rowsPerThread }: ThreadRows,
  body: (name: string, line: number, t: number) => string,
): string {
  const { m } = format;
  return times(
    turnPositions / codesPerWord(format),
    (word) =>
      times(
        m,
        (k) => times(rowsPerThread / 4, (t) => body(`${word}_${k}_${t}`, word * m + k, t)),
      ),
  );
}

/** The code word of row `r` of the thread's at a position of the turn: of a vector `w<name>`. */
export function wordOf(
  { format }: Pick<ThreadRows, "format">,
  position: number,
  codebook: number,
  r: number,
): string {
  const word = Math.floor(position / codesPerWord(format));
  return `w${word}_${codebook}_${r >> 2}.${"xyzw"[r & 3]}`;
}

/**
 * Calls `body` for each vector of a thread's scales in a turn: with its name `<scale>_<four>`, the
 * position that it begins at, and its four of the thread's.
 */
export function eachScale(
  { turnPositions, rowsPerThread, order }: ThreadRows,
  body: (name: string, position: number, t: number) => string,
): string {
  const segment = gcd(turnPositions, order.scalePositions);
  return times(
    turnPositions / segment,
    (s) => times(rowsPerThread / 4, (t) => body(`${s}_${t}`, s * segment, t)),
  );
}

/** The scale of row `r` of the thread's at a position of the turn: of a vector `scale<name>`. */
export function scaleOf({ turnPositions, order }: ThreadRows, position: number, r: number): string {
  const segment = Math.floor(position / gcd(turnPositions, order.scalePositions));
  return `scale${segment}_${r >> 2}.${"xyzw"[r & 3]}`;
}

/** Code words `[from, to)` of the turn that begins at `position`, into what `target` names. */
export function loadWords(
  kernel: ThreadRows,
  position: string,
  target: (name: string) => string,
  from = 0,
  to = Infinity,
): string {
  const { format, order } = kernel;
  const rowQuads = order.rowBlock / 4;
  return eachWord(kernel, (name, line, t) => {
    const word = Math.floor(line / format.m);
    if (word < from || word >= to) return "";
    const lines = `${position} / ${codesPerWord(format)}u * ${format.m * rowQuads}u`;
    return `${target(name)} = codes[words${t} + ${lines} + ${line * rowQuads}u];`;
  });
}

/** Scales of the turn that begins at `position`, into what `target` names, as a WGSL type. */
export function loadScales(
  kernel: ThreadRows,
  position: string,
  target: (name: string) => string,
  type = "vec4<f16>",
): string {
  const { scalePositions, rowBlock } = kernel.order;
  return eachScale(kernel, (name, from, t) => {
    const line = `(${position} + ${from}u) / ${scalePositions}u`;
    return `${target(name)} = ${type}(scales[scales${t} + ${line} * ${rowBlock / 4}u]);`;
  });
}

/**
 * Declares where a thread stands in K: its `split`, which has `turns`, and the `position` that its first
 * one begins at.
 *
 * @param unitPositions positions of a unit of the family's order
 */
export function threadTurnsWgsl(
  { order, splits, lanes, turnPositions }: ThreadRows & WorkgroupShare,
  unitPositions: number,
): string {
  return `  let split = workgroup.y * ${splits}u + lane / ${lanes}u;
  let start = split * ${splitPositions(order)}u;
  let turns = (min((split + 1u) * params.split_units, params.units) * ${unitPositions}u - start)
    / ${turnPositions}u;
  var position = start;`;
}
