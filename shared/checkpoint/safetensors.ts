/**
 * The safetensors container: 8 bytes of header length (little-endian), a JSON header, then the
 * tensors' bytes without gaps (https://huggingface.co/docs/safetensors, "Format").
 *
 * @module
 */
import { FleetError, invariant } from "../errors.ts";
import { LIMITS } from "../limits.ts";
import { type DType, DTYPE_BYTES, type TensorInfo } from "../model_config.ts";
import { type FileSource, parseJsonObject } from "./source.ts";

/** A tensor inside a file. */
export interface StoredTensor {
  name: string;
  /** As the file spells it; not all of them are a {@linkcode DType}. */
  dtype: string;
  shape: number[];
  bytes: number;
  file: string;
  /** Of its first byte, from the start of the file. */
  fileOffset: number;
}

/** Bits of the element types we do not read, so that their sizes are checked all the same. */
const OTHER_DTYPE_BITS = new Map(Object.entries({
  BOOL: 8,
  F8_E4M3: 8,
  F8_E5M2: 8,
  F8_E8M0: 8,
  F6_E2M3: 6,
  F6_E3M2: 6,
  F4: 4,
  U16: 16,
  U32: 32,
  U64: 64,
  I64: 64,
  F64: 64,
  C64: 64,
}));

/** True for the element types that we read. */
export function isDType(dtype: string): dtype is DType {
  return Object.hasOwn(DTYPE_BYTES, dtype);
}

/**
 * Reads and checks a file's header: every tensor lies inside the file, none overlaps another, no
 * bytes are left over, and each has the bytes that its shape and type ask for.
 *
 * @throws FleetError `bad-checkpoint` that names the file and, where one is to blame, the tensor
 */
export async function readHeader(files: FileSource, file: string): Promise<StoredTensor[]> {
  const fileBytes = await files.size(file);
  const bad = (what: string) => new FleetError("bad-checkpoint", `${file}: ${what}`);
  if (fileBytes < 8) {
    throw bad(`${fileBytes} bytes are too few for a safetensors file; it is truncated`);
  }
  const start = await files.read(file, 0, 8);
  const headerBytes = new DataView(start.buffer).getBigUint64(0, true);
  if (headerBytes > LIMITS.maxSafetensorsHeaderBytes) {
    throw bad(
      `its header claims ${headerBytes} bytes (at most ${LIMITS.maxSafetensorsHeaderBytes} are ` +
        "allowed); this is not a safetensors file",
    );
  }
  const dataStart = 8 + Number(headerBytes);
  if (dataStart > fileBytes) {
    throw bad(`its header claims ${headerBytes} bytes, the file has ${fileBytes}; it is truncated`);
  }
  const header = parseJsonObject(
    `the header of ${file}`,
    decodeUtf8(await files.read(file, 8, Number(headerBytes)), bad),
  );
  const tensors = Object.entries(header)
    .filter(([name]) => name !== "__metadata__")
    .map(([name, entry]) => storedTensor(file, name, entry, dataStart));
  checkPlacement(file, tensors, dataStart, fileBytes);
  return tensors;
}

function decodeUtf8(bytes: Uint8Array, bad: (what: string) => FleetError): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw bad("its header is not UTF-8 text; this is not a safetensors file");
  }
}

function storedTensor(
  file: string,
  name: string,
  entry: unknown,
  dataStart: number,
): StoredTensor {
  const bad = (what: string) => new FleetError("bad-checkpoint", `${file}: tensor ${name} ${what}`);
  const { dtype, shape, data_offsets: offsets } = (entry ?? {}) as Record<string, unknown>;
  if (typeof dtype !== "string") throw bad("has no dtype");
  if (!Array.isArray(shape) || !shape.every(isCount)) throw bad("has no valid shape");
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
    throw bad("has no valid data_offsets");
  }
  const [begin, end] = offsets;
  if (begin > end) throw bad(`ends (byte ${end}) before it begins (byte ${begin})`);
  const bits = isDType(dtype) ? 8 * DTYPE_BYTES[dtype] : OTHER_DTYPE_BITS.get(dtype);
  if (bits === undefined) throw bad(`has the unknown dtype ${dtype}`);
  const bytes = shape.reduce((product, size) => product * size, 1) * bits / 8;
  if (bytes !== end - begin) {
    throw bad(
      `is ${dtype} [${shape.join(", ")}], which takes ${bytes} bytes; the header gives it ${
        end - begin
      }`,
    );
  }
  return { name, dtype, shape, bytes, file, fileOffset: dataStart + begin };
}

function checkPlacement(
  file: string,
  tensors: StoredTensor[],
  dataStart: number,
  fileBytes: number,
): void {
  const bad = (what: string) => new FleetError("bad-checkpoint", `${file}: ${what}`);
  // Ties (empty tensors) in the order of their ends, so that none seems to overlap the next.
  const placed = tensors.toSorted((a, b) => a.fileOffset - b.fileOffset || a.bytes - b.bytes);
  let at = dataStart, before = "the header";
  for (const tensor of placed) {
    if (tensor.fileOffset + tensor.bytes > fileBytes) {
      throw bad(
        `tensor ${tensor.name} ends at byte ${
          tensor.fileOffset + tensor.bytes
        }, the file at byte ` +
          `${fileBytes}; the file is truncated or its header lies`,
      );
    }
    if (tensor.fileOffset < at) throw bad(`tensor ${tensor.name} overlaps ${before}`);
    if (tensor.fileOffset > at) {
      throw bad(
        `bytes ${at} to ${tensor.fileOffset}, before ${tensor.name}, belong to no tensor`,
      );
    }
    at = tensor.fileOffset + tensor.bytes;
    before = tensor.name;
  }
  if (at !== fileBytes) throw bad(`bytes ${at} to ${fileBytes} belong to no tensor`);
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

/**
 * The bytes before a file's tensors: length and header, padded so that the tensors begin at a
 * multiple of 8. The tensors follow in the given order.
 *
 * @param metadata strings that the file carries along; other tools look for `{format: "pt"}`
 */
export function encodeHeader(
  tensors: readonly TensorInfo[],
  metadata: Record<string, string> = { format: "pt" },
): Uint8Array<ArrayBuffer> {
  let at = 0;
  const entries = tensors.map(({ name, dtype, shape, bytes }) => {
    invariant(
      bytes === shape.reduce((a, b) => a * b, 1) * DTYPE_BYTES[dtype],
      `${name} has the bytes of its shape`,
    );
    return [name, { dtype, shape, data_offsets: [at, at += bytes] }] as const;
  });
  invariant(new Set(tensors.map((t) => t.name)).size === tensors.length, "names differ");
  const json = new TextEncoder().encode(
    JSON.stringify({ __metadata__: metadata, ...Object.fromEntries(entries) }),
  );
  const headerBytes = Math.ceil(json.length / 8) * 8;
  const out = new Uint8Array(8 + headerBytes).fill(0x20);
  new DataView(out.buffer).setBigUint64(0, BigInt(headerBytes), true);
  out.set(json, 8);
  return out;
}

/** A tensor with its bytes at hand. */
export interface TensorBytes extends TensorInfo {
  data: Uint8Array;
}

/** A whole file in memory. */
export function encodeSafetensors(
  tensors: readonly TensorBytes[],
  metadata?: Record<string, string>,
): Uint8Array<ArrayBuffer> {
  const header = encodeHeader(tensors, metadata);
  const out = new Uint8Array(header.length + tensors.reduce((sum, t) => sum + t.bytes, 0));
  out.set(header);
  let at = header.length;
  for (const { name, bytes, data } of tensors) {
    invariant(data.length === bytes, `${name} brings the bytes it announces`);
    out.set(data, at);
    at += bytes;
  }
  return out;
}
