import { assertEquals, assertStringIncludes } from "@std/assert";
import { checkpointFiles, TINY_CONFIG } from "../shared/checkpoint/fixture.ts";
import { directorySource } from "../shared/checkpoint/directory.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";

Deno.test("the command quantizes a directory with no more than file permissions, and overwrites nothing", async () => {
  const path = await Deno.makeTempDir();
  try {
    await Deno.mkdir(`${path}/in`);
    for (const [name, content] of Object.entries(checkpointFiles(TINY_CONFIG))) {
      await Deno.writeFile(
        `${path}/in/${name}`,
        typeof content === "string" ? new TextEncoder().encode(content) : content,
      );
    }
    const quantize = async (...args: string[]) => {
      const { code, stderr } = await new Deno.Command(Deno.execPath(), {
        args: [
          "run",
          "--no-prompt",
          `--allow-read=${path}`,
          `--allow-write=${path}`,
          new URL("main.ts", import.meta.url).pathname,
          ...args,
        ],
      }).output();
      return { code, text: new TextDecoder().decode(stderr) };
    };
    const files = ["--in", `${path}/in`, "--out", `${path}/out`];
    const first = await quantize(...files, "--format", "m1v4g16", "--rounds", "1");
    assertEquals(first.code, 0, first.text);
    assertStringIncludes(first.text, "14/14 model.layers.1.mlp.down_proj: error ");
    const result = await openCheckpoint(directorySource(`${path}/out`));
    assertEquals(result.config.codegemm, { m: 1, v: 4, g: 16, b: 8 });

    const again = await quantize(...files, "--format", "m1v4g16");
    assertEquals(again.code, 1);
    assertStringIncludes(again.text, "out is not empty");
    const wrong = await quantize(...files, "--format", "2bit");
    assertEquals(wrong.code, 2);
    assertStringIncludes(wrong.text, "--format takes mXvYgZ");
  } finally {
    await Deno.remove(path, { recursive: true });
  }
});
