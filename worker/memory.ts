/**
 * How much memory the GPU has to give. WebGPU does not tell, so the vendor's own tool or driver is
 * asked; what cannot be found out must be said with `--memory`.
 *
 * @module
 */
import type { GpuInfo } from "../kernels/gpu.ts";
import { FleetError } from "../shared/errors.ts";

const MiB = 2 ** 20;
const GiB = 2 ** 30;

/** Kept free of what was found: the driver's own, compiled kernels, staging, a display. */
const RESERVED_SHARE = 0.05;
/** A software adapter's share of the machine's memory, unless `--memory` says another. */
const SOFTWARE_SHARE = 1 / 4;
/** What Metal recommends as a GPU's working set is between 2/3 and 3/4 of Apple silicon's memory. */
const APPLE_SHARE = 2 / 3;
/** amdgpu's cards are looked for under these numbers. */
const DRM_CARDS = 16;

/** What is asked of the machine, as arguments, so that recorded answers can stand in. */
export interface Machine {
  os: string;
  /** Bytes of main memory. */
  memoryBytes: () => number;
  /** A program's standard output, whatever its exit status; null where there is no such program. */
  run: (program: string, args: string[]) => Promise<string | null>;
}

/** Memory for weights, pages and scratch, and how it was found out. */
export interface GpuMemory {
  bytes: number;
  source: string;
}

/** What the command line says about memory. */
export interface MemoryWish {
  /** Taken as it is. */
  bytes?: number;
  /** Of the whole GPU, where `bytes` is absent: 1 / n for n workers on one GPU. */
  share: number;
}

/** A GPU's memory in bytes, and where that is from. */
interface Found {
  total: number;
  /** What others have left of it. */
  free: number;
  source: string;
}

/**
 * A share counts from the whole, not from what is free: another worker on the same GPU may have taken
 * its own share already.
 *
 * @param gpu the adapter that was opened
 * @throws FleetError `gpu` that names the flag when the memory cannot be found out
 */
export async function gpuMemory(
  gpu: GpuInfo,
  wish: MemoryWish,
  machine: Machine,
): Promise<GpuMemory> {
  if (wish.bytes !== undefined) return { bytes: wish.bytes, source: "--memory" };
  const shared = (source: string) =>
    wish.share < 1 ? `${Math.round(wish.share * 100)} % of ${source}` : source;
  if (gpu.software) {
    const bytes = Math.floor(machine.memoryBytes() * SOFTWARE_SHARE * wish.share);
    return { bytes, source: shared("a quarter of the machine's memory") };
  }
  const found = machine.os === "darwin"
    ? await appleMemory(machine)
    : await nvidiaMemory(gpu, machine) ?? await amdMemory(machine);
  if (!found) {
    throw new FleetError(
      "gpu",
      `The memory of ${gpu.name} cannot be found out (WebGPU does not tell, and neither nvidia-smi, ` +
        "amdgpu's sysfs nor system_profiler knows it); say it with --memory, as in --memory 22GiB",
    );
  }
  const bytes = Math.min(found.total * wish.share, found.free) * (1 - RESERVED_SHARE);
  return { bytes: Math.floor(bytes), source: shared(`what ${found.source} tells`) };
}

/**
 * `nvidia-smi` prints a line per GPU: `NVIDIA H200, 143771, 4` (name, MiB in all, MiB in use). Of
 * several GPUs of the adapter's name the one with the least free memory counts, for WebGPU does not
 * tell which of them it opened.
 */
async function nvidiaMemory(gpu: GpuInfo, machine: Machine): Promise<Found | null> {
  const output = await machine.run("nvidia-smi", [
    "--query-gpu=name,memory.total,memory.used",
    "--format=csv,noheader,nounits",
  ]);
  let fullest: Found | null = null;
  for (const line of output?.split("\n") ?? []) {
    const [name, totalMiB, usedMiB] = line.split(",").map((field) => field.trim());
    const total = Number(totalMiB) * MiB, free = total - Number(usedMiB) * MiB;
    if (!gpu.name.includes(name) || !(free > 0)) continue;
    if (!fullest || free < fullest.free) fullest = { total, free, source: "nvidia-smi" };
  }
  return fullest;
}

/**
 * amdgpu tells bytes in files of each card. `grep` reads them, because Deno lets nobody read `/sys`
 * without `--allow-all`; it prints `PATH:VALUE` and passes over files that are not there. Of several
 * cards the one with the most memory counts: it is the one that WebGPU prefers.
 */
async function amdMemory(machine: Machine): Promise<Found | null> {
  if (machine.os !== "linux") return null;
  const folders = Array.from(
    { length: DRM_CARDS },
    (_, card) => `/sys/class/drm/card${card}/device/mem_info_vram`,
  );
  const files = folders.flatMap((folder) => [`${folder}_total`, `${folder}_used`]);
  const output = await machine.run("grep", ["-Hs", ".", ...files]);
  const values = new Map<string, number>();
  for (const line of output?.split("\n") ?? []) {
    const [path, value] = line.split(":");
    values.set(path, Number(value));
  }
  let best: Found | null = null;
  for (const folder of folders) {
    const total = values.get(`${folder}_total`), used = values.get(`${folder}_used`);
    if (!total || used === undefined || !(used < total)) continue;
    if (!best || total > best.total) best = { total, free: total - used, source: "amdgpu" };
  }
  return best;
}

/** A discrete GPU says its memory; Apple silicon shares the machine's. */
async function appleMemory(machine: Machine): Promise<Found | null> {
  const output = await machine.run("system_profiler", [
    "SPDisplaysDataType",
    "SPHardwareDataType",
    "-json",
  ]);
  let profile: {
    SPDisplaysDataType?: Record<string, unknown>[];
    SPHardwareDataType?: Record<string, unknown>[];
  };
  try {
    profile = JSON.parse(output ?? "");
  } catch {
    return null;
  }
  const sizes = (entries: Record<string, unknown>[] | undefined, key: string) =>
    (entries ?? []).map((entry) => appleBytes(entry[key])).filter((bytes) => bytes > 0);
  const discrete = sizes(profile.SPDisplaysDataType, "spdisplays_vram");
  const [shared] = sizes(profile.SPHardwareDataType, "physical_memory");
  const total = discrete.length > 0 ? Math.max(...discrete) : (shared ?? 0) * APPLE_SHARE;
  return total > 0 ? { total, free: total, source: "system_profiler" } : null;
}

/** Bytes of `"8 GB"`, which means GiB; 0 of anything else. */
function appleBytes(text: unknown): number {
  const [, digits, unit] = /^([\d.]+) (MB|GB|TB)$/.exec(String(text)) ?? [];
  const scale = unit === "MB" ? MiB : unit === "TB" ? 1024 * GiB : GiB;
  return digits ? Number(digits) * scale : 0;
}
