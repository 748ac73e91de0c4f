/**
 * Control messages (JSON) and subjects. Every message is parsed with zod at the door; inside, the
 * types are trusted.
 *
 * | subject | who publishes | what |
 * | --- | --- | --- |
 * | `PREFIX.call` | coordinator | roll call: every worker answers with its card |
 * | `PREFIX.hello.<worker>` | worker | its {@linkcode WorkerCard} |
 * | `PREFIX.beat.<worker>` | worker | {@linkcode Beat}, every `LIMITS.beatEveryMs` |
 * | `PREFIX.report.<worker>` | worker | {@linkcode WorkerReport} |
 * | `PREFIX.ctl.<worker>` | coordinator | {@linkcode ControlRequest}; answered with {@linkcode ControlReply} |
 * | `PREFIX.step.<to>.<from>.<epoch>` | stage or coordinator | frames (`codec.ts`) |
 *
 * @module
 */
import { z } from "zod";
import { FleetError } from "./errors.ts";
import { LIMITS } from "./limits.ts";

/** Both ends must speak the same one; raised with every change of a frame or message. */
export const PROTOCOL_VERSION = 3;

/** Prefix of a fleet's subjects where none is given. */
export const DEFAULT_PREFIX = "fleet";

/** Port of the fleet's websocket listener in NATS where none is given. */
export const DEFAULT_NATS_PORT = 9222;

/** Where workers and coordinator look for NATS where nothing is said. */
export const DEFAULT_NATS_URL = `ws://127.0.0.1:${DEFAULT_NATS_PORT}`;

/** The coordinator's name in step subjects. */
export const COORDINATOR = "coordinator";

/** Names in subjects: NATS tokens. */
export const Name = z.string().regex(/^[A-Za-z0-9_-]{1,64}$/, "letters, digits, - and _ only");

/** Builders of every subject under one prefix. */
export function subjects(prefix: string) {
  return {
    call: `${prefix}.call`,
    hello: (worker: string) => `${prefix}.hello.${worker}`,
    beat: (worker: string) => `${prefix}.beat.${worker}`,
    report: (worker: string) => `${prefix}.report.${worker}`,
    ctl: (worker: string) => `${prefix}.ctl.${worker}`,
    step: (to: string, from: string, epoch: number | string) =>
      `${prefix}.step.${to}.${from}.${epoch}`,
    /** The object store bucket (a NATS stream name: no dots). */
    bucket: `${prefix.replaceAll(".", "_")}_weights`,
    /** The KV bucket of lease and plan. */
    state: `${prefix.replaceAll(".", "_")}_state`,
  };
}

/** Subjects of one fleet. */
export type Subjects = ReturnType<typeof subjects>;

const u32 = z.number().int().min(0).max(0xffffffff);
const count = z.number().int().min(0).max(Number.MAX_SAFE_INTEGER);
/** A measured speed or time: what a lying card cannot make the planner overflow with. */
const figure = z.number().max(1e15);
const hex256 = z.string().regex(/^[0-9a-f]{64}$/);

/** What a worker is: sent when it starts and at every roll call. */
export const WorkerCard = z.object({
  version: z.number().int(),
  worker: Name,
  /** Random per process: a restarted worker of the same name is another instance. */
  instance: Name,
  host: z.string().max(256),
  gpu: z.object({
    name: z.string().max(256),
    software: z.boolean(),
  }),
  /** Memory for weights, pages and scratch, bytes. */
  memoryBytes: count,
  /** The adapter's largest storage binding, bytes. */
  maxBindingBytes: count,
  /** SHA-256 of the self-test's outputs: equal digests compute equal bits. */
  selfTestDigest: hex256,
  /** Short calibration with the real kernels. */
  calibration: z.object({
    /** Dense float16 weight bytes a decode step reads per millisecond. */
    denseBytesPerMs: figure.min(1e-3),
    /** CodeGEMM weight bytes a decode step reads per millisecond, of codes of 8 bits. */
    codegemmBytesPerMs: figure.min(1e-3),
    /** The same of codes of more bits, whose centroids come from a cache (AQLM's 1x16). */
    wideCodeBytesPerMs: figure.min(1e-3),
    /** What a layer costs beside its weights, ms. */
    overheadMsPerLayer: figure.nonnegative(),
  }),
  /** Digests of parts on its disk or GPU already. */
  cachedParts: z.array(hex256).max(4096),
});
/** What a worker is. */
export type WorkerCard = z.infer<typeof WorkerCard>;

/**
 * The part of a card that every version of the protocol shares, so that a worker of another release
 * can be told apart from rubbish.
 */
export const WorkerIdentity = z.object({ version: z.number().int(), worker: Name, instance: Name });

/** A sign of life, from a thread that never waits for the GPU. */
export const Beat = z.object({
  worker: Name,
  instance: Name,
  sequence: count,
  /** The worker's clock, ms since the Unix epoch. */
  sentAtMs: z.number(),
  /** The epoch it serves or loads; 0 for none. */
  epoch: u32,
  state: z.enum(["idle", "loading", "serving", "failed"]),
  /** Frames dropped since the process started, by reason. */
  dropped: z.record(z.string().max(64), count).refine(
    (dropped) => Object.keys(dropped).length <= LIMITS.maxDropReasons,
    `at most ${LIMITS.maxDropReasons} reasons`,
  ),
});
/** A sign of life. */
export type Beat = z.infer<typeof Beat>;

/** The version of profiles made by this code. */
export const PROFILE_VERSION = 4;

/** What decides every bit of a row's arithmetic; see DESIGN: recorded in the plan. */
export const NumericsProfile = z.object({
  /** Raised whenever a kernel's order of operations changes. */
  version: z.number().int(),
  /**
   * The kernel family of decode rows of 8-bit codes; those of more bits always dequantize. `int8`
   * rounds activations and centroids to eight bits, and those of prefill rows too; codes whose groups
   * do not fill words of integers, or whose codebooks are large, dequantize instead.
   */
  decode: z.enum(["codegemm", "dequantize", "int8"]),
});
/** What decides every bit of a row's arithmetic. */
export type NumericsProfile = z.infer<typeof NumericsProfile>;

/**
 * The kernel family that decodes a format fastest (measured on an H200, see bench/README.md): with one
 * codebook, centroids are gathered without a bank conflict at any batch; with more, Psumbooks win up
 * to four rows.
 */
export function fastestDecode(format: { m: number } | null): NumericsProfile["decode"] {
  return format?.m === 1 ? "dequantize" : "codegemm";
}

/** A part of the model: its name, its manifest's digest, its size. */
export const PartRef = z.object({
  part: z.string().regex(/^(embedding|head|layer\.\d{1,5})$/),
  /** SHA-256 of the manifest, which lists the shards by theirs. */
  digest: hex256,
  bytes: count,
});
/** A part of the model. */
export type PartRef = z.infer<typeof PartRef>;

/** Bounds of a stage, fixed when the plan is made; buffers are allocated by them at load. */
export const StageLimits = z.object({
  maxRows: z.number().int().min(1).max(LIMITS.maxRowsPerStep),
  maxSequences: z.number().int().min(1).max(LIMITS.maxSequencesPerStep),
  maxOutputs: z.number().int().min(1).max(LIMITS.maxOutputsPerStep),
  /** KV pages of the pipeline: page ids are `[0, pages)`. */
  pages: z.number().int().min(1),
  /** Longest sequence, tokens. */
  contextTokens: z.number().int().min(1),
});
/** Bounds of a stage. */
export type StageLimits = z.infer<typeof StageLimits>;

/** What the coordinator asks of a worker. */
export const ControlRequest = z.discriminatedUnion("type", [
  /** Load these layers and serve this epoch. Accepted at once; `ready` or `failed` is reported. */
  z.object({
    type: z.literal("assign"),
    version: z.number().int(),
    instance: Name,
    epoch: u32,
    /** `config.json` of the checkpoint, as JSON text. */
    config: z.string().max(128 * 1024),
    /** Digest of the whole model (over its part digests). */
    modelDigest: hex256,
    stage: z.object({
      index: z.number().int().min(0),
      stages: z.number().int().min(1).max(LIMITS.maxStages),
      from: z.number().int().min(0),
      to: z.number().int().min(1),
      first: z.boolean(),
      last: z.boolean(),
    }),
    /** Who sends it frames, and whom it sends to (`coordinator` at the ends). */
    previous: Name,
    next: Name,
    parts: z.array(PartRef).max(4096),
    limits: StageLimits,
    profile: NumericsProfile,
  }),
  /** Stop serving this epoch; weights stay where they are. */
  z.object({ type: z.literal("release"), instance: Name, epoch: u32 }),
  /** A round trip, to measure the wire and the clocks. */
  z.object({ type: z.literal("ping"), sentAtMs: z.number() }),
]);
/** What the coordinator asks of a worker. */
export type ControlRequest = z.infer<typeof ControlRequest>;
/** The request to serve a stage. */
export type AssignStage = Extract<ControlRequest, { type: "assign" }>;

/** The answer to a {@linkcode ControlRequest}. */
export const ControlReply = z.discriminatedUnion("type", [
  z.object({ type: z.literal("ok"), nowMs: z.number() }),
  z.object({ type: z.literal("refused"), reason: z.string().max(4096) }),
]);
/** The answer to a control request. */
export type ControlReply = z.infer<typeof ControlReply>;

/** What a worker says on its own account. */
export const WorkerReport = z.discriminatedUnion("type", [
  z.object({ type: z.literal("ready"), instance: Name, epoch: u32, loadMs: z.number() }),
  z.object({
    type: z.literal("failed"),
    instance: Name,
    epoch: u32,
    code: z.string().max(64),
    message: z.string().max(4096),
  }),
  /** A stage saw `got` where it expected `expected`: the coordinator raises the attempt. */
  z.object({
    type: z.literal("gap"),
    instance: Name,
    epoch: u32,
    attempt: u32,
    expected: u32,
    got: u32,
  }),
  z.object({
    type: z.literal("progress"),
    instance: Name,
    epoch: u32,
    part: z.string().max(64),
    doneBytes: count,
    totalBytes: count,
    from: z.enum(["gpu", "disk", "cache", "store"]),
  }),
  /** The worker asks to leave; its layers should move first. */
  z.object({ type: z.literal("leaving"), instance: Name }),
]);
/** What a worker says on its own account. */
export type WorkerReport = z.infer<typeof WorkerReport>;

/** Serializes a control message. */
export function encodeControl(message: unknown): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(JSON.stringify(message));
}

/**
 * Parses a control message at the door.
 *
 * @throws FleetError `bad-frame` when it is oversized, not UTF-8, not JSON or of the wrong shape
 */
export function decodeControl<T>(schema: z.ZodType<T>, data: Uint8Array): T {
  if (data.byteLength > LIMITS.maxControlBytes) {
    throw new FleetError("bad-frame", `A control message of ${data.byteLength} bytes is too large`);
  }
  let json: unknown;
  try {
    json = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
  } catch (cause) {
    throw new FleetError("bad-frame", "A control message is not JSON", { cause });
  }
  const parsed = schema.safeParse(json);
  if (!parsed.success) {
    const [{ path, message }] = parsed.error.issues;
    const where = path.length > 0 ? `${path.join(".").slice(0, 100)}: ` : "";
    throw new FleetError("bad-frame", `A control message is malformed: ${where}${message}`);
  }
  return parsed.data;
}
