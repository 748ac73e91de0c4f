import { assertEquals, assertStringIncludes } from "@std/assert";
import { checkpointFiles, TINY_CONFIG } from "../shared/checkpoint/fixture.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";

/** Runs the command on a tiny float checkpoint at `path/in`, with no more than file permissions. */
async function withCommand(
  work: (
    quantize: (...args: string[]) => Promise<{ code: number; stdout: string; stderr: string }>,
    path: string,
  ) => Promise<void>,
): Promise<void> {
  const path = await Deno.makeTempDir();
  try {
    await Deno.mkdir(`${path}/in`);
    for (const [name, content] of Object.entries(checkpointFiles(TINY_CONFIG))) {
      const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
      await Deno.writeFile(`${path}/in/${name}`, bytes);
    }
    await work(async (...args) => {
      const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
        args: [
          "run",
          "--no-prompt",
          `--allow-read=${path}`,
          `--allow-write=${path}`,
          "--allow-env=INIT_CWD",
          new URL("main.ts", import.meta.url).pathname,
          ...["--in", `${path}/in`, "--rounds", "1", ...args],
        ],
      }).output();
      const text = new TextDecoder();
      return { code, stdout: text.decode(stdout), stderr: text.decode(stderr) };
    }, path);
  } finally {
    await Deno.remove(path, { recursive: true });
  }
}

Deno.test("the command quantizes a directory with no more than file permissions, and overwrites nothing", () =>
  withCommand(async (quantize, path) => {
    const out = ["--out", `${path}/out`];
    const first = await quantize(...out, "--format", "m1v4g16");
    assertEquals(first.code, 0, first.stderr);
    assertStringIncludes(first.stderr, "14/14 model.layers.1.mlp.down_proj: error ");
    const result = await openCheckpoint(directorySource(`${path}/out`));
    assertEquals(result.config.codegemm, { m: 1, v: 4, g: 16, b: 8 });

    const again = await quantize(...out, "--format", "m1v4g16");
    assertEquals(again.code, 1);
    assertStringIncludes(again.stderr, "out is not empty");
    const wrong = await quantize(...out, "--format", "2bit");
    assertEquals(wrong.code, 2);
    assertStringIncludes(wrong.stderr, "--format takes mXvYgZ");
  }));

Deno.test("the command keeps in float16 what the format does not suit, where it may", () =>
  withCommand(async (quantize, path) => {
    // K of down_proj is 48: no multiple of 32.
    const refused = await quantize("--out", `${path}/no`, "--format", "m1v4g32");
    assertStringIncludes(refused.stderr, "mlp.down_proj (N 32, K 48)");
    const flags = ["--format", "m1v4g32", "--fallback", "float16"];
    const kept = await quantize("--out", `${path}/out`, ...flags);
    assertEquals(kept.code, 0, kept.stderr);
    const result = await openCheckpoint(directorySource(`${path}/out`));
    assertEquals(result.has("model.layers.1.mlp.down_proj.weight"), true);
    assertEquals(result.has("model.layers.1.mlp.up_proj.codes"), true);
  }));

Deno.test("the command plans without a GPU, and writes nothing", () =>
  withCommand(async (quantize, path) => {
    await Deno.writeTextFile(`${path}/text.json`, JSON.stringify({ tokens: Array(64).fill(7) }));
    const plan = (batch: string, sequence = "8") =>
      quantize(
        ...["--out", `${path}/out`, "--format", "m1v4g16", "--dry-run"],
        ...["--calibration", `${path}/text.json`, "--sequence", sequence, "--batch", batch],
      );
    const planned = await plan("4");
    assertEquals(planned.code, 0, planned.stderr);
    assertStringIncludes(planned.stdout, "bits per quantized weight");
    const short = await plan("9");
    assertEquals(short.code, 2);
    assertStringIncludes(short.stderr, "Too little calibration text");
    const long = await plan("1", "132");
    assertEquals(long.code, 2);
    assertStringIncludes(long.stderr, "longer than the model's context of 128 tokens");
    assertEquals([...Deno.readDirSync(path)].some(({ name }) => name === "out"), false);
  }));
