/**
 * What the decode kernel with Psumbooks is generated from on GPUs, and how its shape is chosen.
 *
 * A turn's Psumbooks, counted by position and then by codebook, are shared out: threads form teams,
 * each of which makes every so many-th of them, and a team's threads share out the 256 entries. So a
 * thread needs the centroids of few codebooks, which it keeps in registers.
 *
 * @module
 */
import type { CodeGemmFormat } from "../../shared/model_config.ts";
import { turnPositions } from "./code_kernel.ts";
import { hasPackedDot } from "./code_words_wgsl.ts";
import type { CodeOrder } from "./order.ts";
import { gcd, psumbookColumns, roundUp } from "./order.ts";
import type { DecodeChoice } from "./variant.ts";
import type { Batch } from "./wgsl.ts";
import { type KernelRoom } from "./workgroup_share.ts";

/** One kernel. Nothing but format and order decides a bit of its result. */
export interface PsumbookKernel {
  /** 8-bit codes. */
  format: CodeGemmFormat;
  order: CodeOrder;
  /** Rows of the step that a workgroup takes: lanes of a vector. */
  batch: Batch & (1 | 2 | 4);
  /** Threads of a workgroup, a power of two. */
  threads: number;
  /** Rows of N a thread holds: 4 or 8. */
  rowsPerThread: 4 | 8;
  /** Positions whose code words a thread has in registers: they divide a unit. */
  turnPositions: number;
  /** A power of two that divides the codebooks, or is a multiple of them. */
  teams: number;
  /** Psumbooks that stand in each half of workgroup memory. */
  stageBooks: number;
  /** Turns whose activations stand in workgroup memory at a time. */
  inputTurns: number;
  /** Code words are loaded a turn ahead: less waiting, more registers. */
  prefetch: boolean;
  /** Rows of the input begin at multiples of 4 elements, and vectors of a multiple of 4 are bound so. */
  vectorInput: boolean;
  /** WGSL has packed dot products. */
  packed: boolean;
}

const ENTRIES = 256;
const MOST_THREADS = 1024;
/** A warp of an NVIDIA GPU. */
const LEAST_THREADS = 32;
/** So few rows of N come in many workgroups side by side, which rather have few threads each. */
const SHORT_COLUMNS = 1024;
/** Workgroups below which shorter ones fill a large GPU better. */
const ENOUGH_WORKGROUPS = 96;
/** Shorter workgroups would make more Psumbooks than they have rows of N to use them. */
const LEAST_COLUMNS = ENTRIES;
/** Entries of a Psumbook that a thread makes at a time: they share loads of activations. */
const MOST_ENTRIES = 4;
/** Float16 weights of centroids in a thread's registers, two in each. */
const MOST_CENTROID_WEIGHTS = 32;
/** Code words of a turn in a thread's registers that may be there twice. */
const MOST_PREFETCHED = 16;
/** K whose activations a workgroup holds at a time. */
const INPUT_K = 1024;

/** Rows of N of a workgroup. */
export function workgroupColumns(
  { threads, rowsPerThread }: Pick<PsumbookKernel, "threads" | "rowsPerThread">,
): number {
  return threads * rowsPerThread;
}

/** Entries of a Psumbook that a thread makes. */
export function threadEntries({ threads, teams }: PsumbookKernel): number {
  return ENTRIES * teams / threads;
}

/** Codebooks whose centroids a thread holds. */
export function threadCodebooks({ format, teams }: PsumbookKernel): number {
  return Math.max(1, format.m / teams);
}

/** Rounds of a stage; in each, every team makes a Psumbook. */
export function stageRounds({ stageBooks, teams }: PsumbookKernel): number {
  return Math.ceil(stageBooks / teams);
}

/** Vectors of 4 activations at a position. */
export function positionQuads({ v }: CodeGemmFormat): number {
  return Math.ceil(v / 4);
}

/** Workgroup memory of a kernel, bytes. */
export function psumbookBytes(kernel: PsumbookKernel): number {
  return 2 * stageRounds(kernel) * roundBytes(kernel) + kernel.inputTurns * turnBytes(kernel);
}

function roundBytes({ teams, batch }: Pick<PsumbookKernel, "teams" | "batch">): number {
  return teams * ENTRIES * 2 * batch;
}

function turnBytes(
  { turnPositions, format, batch }: Pick<PsumbookKernel, "turnPositions" | "format" | "batch">,
): number {
  return turnPositions * positionQuads(format) * 8 * batch;
}

/**
 * The kernel of a batch on this adapter, or null where none fits: a smaller batch may.
 *
 * @param vectorInput the input can be bound as vectors of 4
 */
export function psumbookKernel(
  format: CodeGemmFormat,
  order: CodeOrder,
  batch: Batch,
  choice: DecodeChoice,
  room: KernelRoom,
  vectorInput: boolean,
): PsumbookKernel | null {
  if (batch > 4) return null;
  const wantedK = choice.turnK ?? order.unitPositions * format.v;
  const base = {
    format,
    order,
    batch: batch as PsumbookKernel["batch"],
    turnPositions: turnPositions(order, format, "codegemm", wantedK),
    vectorInput: vectorInput && format.v % 4 === 0,
    packed: hasPackedDot(),
  };
  for (const shape of shapes(order, choice, room)) {
    const words = base.turnPositions / 4 * format.m * shape.rowsPerThread;
    const prefetch = choice.prefetch ?? words <= MOST_PREFETCHED;
    for (const teams of teamCounts(base, shape.threads)) {
      const kernel = fit({ ...base, ...shape, prefetch, teams }, room.workgroupBytes);
      if (kernel !== null) return kernel;
    }
  }
  return null;
}

/**
 * Threads, and the rows of N of each: first what a large GPU runs fastest, then ever smaller ones. Tall
 * workgroups have four rows a thread: more of them would leave too few threads to hide the gathers.
 */
function* shapes(order: CodeOrder, choice: DecodeChoice, room: KernelRoom) {
  const most = Math.min(MOST_THREADS, choice.codeThreads ?? MOST_THREADS, room.maxThreads);
  const columns = columnsOf(order, room);
  const wanted = choice.codeRowsPerThread ?? (columns === SHORT_COLUMNS ? 8 : 4);
  for (let threads = columns / wanted; threads >= LEAST_THREADS; threads /= 2) {
    if (threads > most) continue;
    const rowsPerThread = choice.codeRowsPerThread ?? (columns / threads >= 8 ? 8 : 4);
    yield { threads, rowsPerThread } as const;
  }
}

/**
 * Rows of N of a workgroup: as many as leave enough workgroups, and of one matrix of a stack, wherever
 * the stack is cut into bindings.
 */
function columnsOf({ splits }: CodeOrder, { members, bindingRows }: KernelRoom): number {
  const n = members.reduce((sum, rows) => sum + rows, 0);
  let columns = psumbookColumns(members);
  if (members.length > 1) columns = gcd(columns, bindingRows);
  while (columns > LEAST_COLUMNS && Math.ceil(n / columns) * splits < ENOUGH_WORKGROUPS) {
    columns /= 2;
  }
  return columns;
}

/** How many teams so many threads may form, the best first. */
function teamCounts(
  { format: { m, v }, turnPositions }: Pick<PsumbookKernel, "format" | "turnPositions">,
  threads: number,
): number[] {
  const counts: number[] = [];
  for (let teams = Math.max(1, threads / ENTRIES); teams <= threads; teams *= 2) {
    const entries = ENTRIES * teams / threads;
    const codebooks = Math.max(1, m / teams);
    if (m % teams !== 0 && teams % m !== 0) continue;
    // With few threads a thread makes many entries even so.
    const needed = counts.length === 0;
    const affordable = entries <= MOST_ENTRIES && entries * codebooks * v <= MOST_CENTROID_WEIGHTS;
    const busy = teams <= turnPositions * m / 2;
    if (needed || (affordable && busy)) counts.unshift(teams);
  }
  return counts;
}

/** The kernel with as few stages, and as many turns' activations, as fit; null where none does. */
function fit(
  kernel: Omit<PsumbookKernel, "stageBooks" | "inputTurns">,
  workgroupBytes: number,
): PsumbookKernel | null {
  const { format: { m, v }, order, turnPositions, teams } = kernel;
  const rounds = Math.floor((workgroupBytes - turnBytes(kernel)) / (2 * roundBytes(kernel)));
  if (rounds < 1) return null;
  // An even number of stages, so that every turn begins with the same half.
  const books = turnPositions * m;
  const stages = roundUp(Math.ceil(books / (rounds * teams)), 2);
  const perStage = Math.ceil(books / stages);
  // A team's codebooks are the same in every stage.
  const stageBooks = roundUp(perStage, perStage > teams ? teams : Math.min(teams, m));
  const sized = { ...kernel, stageBooks, inputTurns: 0 };
  const free = workgroupBytes - psumbookBytes(sized);
  const splitTurns = order.splitUnits * (order.unitPositions / turnPositions);
  const inputTurns = Math.min(
    splitTurns,
    Math.max(1, Math.floor(INPUT_K / (turnPositions * v))),
    Math.floor(free / turnBytes(kernel)),
  );
  return { ...sized, inputTurns };
}
