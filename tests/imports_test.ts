import { assertEquals } from "@std/assert";

/** What each folder may import from; a folder may always import from itself. */
const MAY_IMPORT: Record<string, string[]> = {
  shared: [],
  kernels: ["shared"],
  model: ["shared", "kernels"],
  worker: ["shared", "kernels", "model"],
  quantize: ["shared", "kernels", "model"],
  coordinator: ["shared"],
};

const ROOT = new URL("../", import.meta.url);

async function* sources(folder: URL): AsyncGenerator<URL> {
  for await (const entry of Deno.readDir(folder)) {
    if (entry.isDirectory) yield* sources(new URL(`${entry.name}/`, folder));
    else if (entry.name.endsWith(".ts")) yield new URL(entry.name, folder);
  }
}

/** Relative imports of a module, static and dynamic. */
function importsOf(source: string, at: URL): URL[] {
  const found = source.matchAll(/(?:from|import)\s*\(?\s*["'](\.[^"']+)["']/g);
  return [...found].map((match) => new URL(match[1], at));
}

function folderOf(url: URL): string {
  return url.pathname.slice(ROOT.pathname.length).split("/")[0];
}

Deno.test("imports run down only, and tests stand apart", async () => {
  const wrong: string[] = [];
  for (const [folder, allowed] of Object.entries(MAY_IMPORT)) {
    for await (const file of sources(new URL(`${folder}/`, ROOT))) {
      const isTest = /_(test|bench)\.ts$/.test(file.pathname);
      // A unit test may use the fixtures in tests/, and what its folder may use.
      const may = new Set([folder, ...allowed, ...(isTest ? ["tests", "deno.json"] : [])]);
      for (const target of importsOf(await Deno.readTextFile(file), file)) {
        if (!may.has(folderOf(target))) {
          wrong.push(`${file.pathname.slice(ROOT.pathname.length)} imports ${folderOf(target)}`);
        }
      }
    }
  }
  assertEquals(wrong, []);
});

Deno.test("what may run in a browser one day touches no Deno API", async () => {
  // Shells around the core: they own files, processes, sockets and command lines.
  const shells = [
    "shared/flags.ts",
    "shared/nats_bus.ts",
    "shared/checkpoint/directory.ts",
    "worker/main.ts",
    "worker/memory.ts",
    "worker/cache.ts",
    "worker/transfer_thread.ts",
    "worker/gpu_thread.ts",
  ];
  const wrong: string[] = [];
  for (const folder of ["shared", "kernels", "model", "worker"]) {
    for await (const file of sources(new URL(`${folder}/`, ROOT))) {
      const name = file.pathname.slice(ROOT.pathname.length);
      if (/_(test|bench)\.ts$/.test(name) || shells.includes(name)) continue;
      const code = (await Deno.readTextFile(file)).replace(/\/\*[\s\S]*?\*\/|\/\/.*/g, "");
      if (/\bDeno\./.test(code)) wrong.push(name);
    }
  }
  assertEquals(wrong, []);
});
