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

/**
 * @param gpu the adapter that was opened
 * @param askedBytes what `--memory` said, if it did; taken as it is
 * @throws FleetError `gpu` that names the flag when the memory cannot be found out
 */
export async function gpuMemory(
  gpu: GpuInfo,
  askedBytes: number | undefined,
  machine: Machine,
): Promise<GpuMemory> {
  if (askedBytes !== undefined) return { bytes: askedBytes, source: "--memory" };
  if (gpu.software) {
    const bytes = Math.floor(machine.memoryBytes() * SOFTWARE_SHARE);
    return { bytes, source: "a quarter of the machine's memory" };
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
  return { ...found, bytes: Math.floor(found.bytes * (1 - RESERVED_SHARE)) };
}

/**
 * `nvidia-smi` prints a line per GPU: `NVIDIA H200, 143771, 4` (name, MiB in all, MiB in use). Of
 * several GPUs of the adapter's name the one with the least free memory counts, for WebGPU does not
 * tell which of them it opened.
 */
async function nvidiaMemory(gpu: GpuInfo, machine: Machine): Promise<GpuMemory | null> {
  const output = await machine.run("nvidia-smi", [
    "--query-gpu=name,memory.total,memory.used",
    "--format=csv,noheader,nounits",
  ]);
  const free: number[] = [];
  for (const line of output?.split("\n") ?? []) {
    const [name, totalMiB, usedMiB] = line.split(",").map((field) => field.trim());
    const freeMiB = Number(totalMiB) - Number(usedMiB);
    if (gpu.name.includes(name) && freeMiB > 0) free.push(freeMiB * MiB);
  }
  return free.length > 0 ? { bytes: Math.min(...free), source: "nvidia-smi" } : null;
}

/**
 * amdgpu tells bytes in files of each card. `grep` reads them, because Deno lets nobody read `/sys`
 * without `--allow-all`; it prints `PATH:VALUE` and passes over files that are not there. Of several
 * cards the one with the most memory counts: it is the one that WebGPU prefers.
 */
async function amdMemory(machine: Machine): Promise<GpuMemory | null> {
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
  let best: { total: number; free: number } | null = null;
  for (const folder of folders) {
    const total = values.get(`${folder}_total`), used = values.get(`${folder}_used`);
    if (!total || used === undefined || !(used < total)) continue;
    if (!best || total > best.total) best = { total, free: total - used };
  }
  return best && { bytes: best.free, source: "amdgpu" };
}

/** A discrete GPU says its memory; Apple silicon shares the machine's. */
async function appleMemory(machine: Machine): Promise<GpuMemory | null> {
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
  if (discrete.length > 0) {
    return { bytes: Math.max(...discrete), source: "system_profiler" };
  }
  const [shared] = sizes(profile.SPHardwareDataType, "physical_memory");
  return shared ? { bytes: shared * APPLE_SHARE, source: "system_profiler" } : null;
}

/** Bytes of `"8 GB"`, which means GiB; 0 of anything else. */
function appleBytes(text: unknown): number {
  const [, digits, unit] = /^([\d.]+) (MB|GB|TB)$/.exec(String(text)) ?? [];
  const scale = unit === "MB" ? MiB : unit === "TB" ? 1024 * GiB : GiB;
  return digits ? Number(digits) * scale : 0;
}
