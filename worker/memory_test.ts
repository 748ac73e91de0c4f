import { assertEquals, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { gpuMemory, type Machine } from "./memory.ts";

const GiB = 2 ** 30;
const MiB = 2 ** 20;

/** A machine that answers with what was recorded; programs without an answer are not installed. */
function machine(os: string, answers: Record<string, string>): Machine & { asked: string[] } {
  const asked: string[] = [];
  return {
    os,
    asked,
    memoryBytes: () => 32 * GiB,
    run: (program) => {
      asked.push(program);
      return Promise.resolve(answers[program] ?? null);
    },
  };
}

const bare = (os: string) => machine(os, {});
const known = async (name: string, on: Machine) =>
  (await gpuMemory({ name, software: false }, { share: 1 }, on)).bytes;
const less = (bytes: number) => Math.floor(bytes * 0.95);

Deno.test("gpuMemory() takes --memory as it is and asks nobody", async () => {
  const on = bare("linux");
  assertEquals(
    await gpuMemory({ name: "any", software: false }, { bytes: 5 * GiB, share: 0.5 }, on),
    {
      bytes: 5 * GiB,
      source: "--memory",
    },
  );
  assertEquals(on.asked, []);
});

Deno.test("gpuMemory() gives a software adapter a share of main memory", async () => {
  const gpu = { name: "llvmpipe", software: true };
  assertEquals((await gpuMemory(gpu, { share: 1 }, bare("linux"))).bytes, 8 * GiB);
  assertEquals(await gpuMemory(gpu, { share: 0.25 }, bare("linux")), {
    bytes: 2 * GiB,
    source: "25 % of a quarter of the machine's memory",
  });
});

Deno.test("gpuMemory() asks nvidia-smi, and counts the fullest GPU of the adapter's name", async () => {
  const one = machine("linux", { "nvidia-smi": "NVIDIA H200, 143771, 4\n" });
  assertEquals(await known("NVIDIA H200", one), less((143771 - 4) * MiB));
  const several = machine("linux", {
    "nvidia-smi": "NVIDIA T400, 2048, 100\nNVIDIA L4, 23034, 1\nNVIDIA L4, 23034, 20000\n",
  });
  assertEquals(await known("NVIDIA L4", several), less(3034 * MiB));
});

Deno.test("gpuMemory() takes a share from the whole, and no more than is free", async () => {
  const half = async (usedMiB: number) => {
    const on = machine("linux", { "nvidia-smi": `NVIDIA L4, 20000, ${usedMiB}\n` });
    return (await gpuMemory({ name: "NVIDIA L4", software: false }, { share: 0.5 }, on)).bytes;
  };
  assertEquals(await half(0), less(10_000 * MiB));
  // The other worker has its half, or more than that.
  assertEquals(await half(9_500), less(10_000 * MiB));
  assertEquals(await half(16_000), less(4_000 * MiB));
});

Deno.test("gpuMemory() asks amdgpu, and counts the largest card", async () => {
  const at = (card: number) => `/sys/class/drm/card${card}/device/mem_info_vram`;
  const on = machine("linux", {
    "nvidia-smi": "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
    grep: `${at(0)}_total:536870912\n${at(0)}_used:16777216\n` +
      `${at(1)}_total:25753026560\n${at(1)}_used:1073741824\n`,
  });
  assertEquals(await known("AMD Radeon RX 7900 XTX (RADV NAVI31)", on), less(25753026560 - GiB));
});

Deno.test("gpuMemory() asks system_profiler on macOS", async () => {
  const silicon = machine("darwin", {
    system_profiler: JSON.stringify({
      SPDisplaysDataType: [{ _name: "Apple M4 Pro", sppci_cores: "20" }],
      SPHardwareDataType: [{ chip_type: "Apple M4 Pro", physical_memory: "48 GB" }],
    }),
  });
  assertEquals(await known("Apple M4 Pro", silicon), less(32 * GiB));
  const discrete = machine("darwin", {
    system_profiler: JSON.stringify({
      SPDisplaysDataType: [{ spdisplays_vram_shared: "1536 MB" }, { spdisplays_vram: "8 GB" }],
      SPHardwareDataType: [{ physical_memory: "32 GB" }],
    }),
  });
  assertEquals(await known("AMD Radeon Pro 5500M", discrete), less(8 * GiB));
});

Deno.test("gpuMemory() names the flag when nobody knows", async () => {
  const answers = [
    bare("linux"),
    bare("windows"),
    bare("darwin"),
    machine("darwin", { system_profiler: "{}" }),
    machine("linux", { "nvidia-smi": "NVIDIA L4, [N/A], [N/A]\n", grep: "" }),
  ];
  for (const on of answers) {
    await assertRejects(() => known("NVIDIA L4", on), FleetError, "--memory 22GiB");
  }
});
