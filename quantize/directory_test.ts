import { assertEquals, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { workDirectory } from "./directory.ts";

const exists = (path: string) => Deno.stat(path).then(() => true, () => false);

Deno.test("an output directory with work in it is taken again, one with anything else is not", async () => {
  const root = await Deno.makeTempDir();
  try {
    const path = `${root}/out`;
    const first = await workDirectory(path);
    await first.work.write("state.json.new", 0, Uint8Array.of(1, 2, 3));
    await first.work.rename("state.json.new", "state.json");
    await first.sink.write("model.safetensors", 4, Uint8Array.of(9));
    const second = await workDirectory(path);
    assertEquals(await second.work.list(), ["state.json"]);
    assertEquals([...await second.work.read("state.json", 1, 2)], [2, 3]);
    await second.work.remove("state.json");
    await second.work.remove("state.json");
    assertEquals(await second.work.list(), []);
    await second.work.clear();
    assertEquals([await exists(`${path}/.quantize`), await exists(`${path}/model.safetensors`)], [
      false,
      true,
    ]);
    const error = await assertRejects(() => workDirectory(path), FleetError, "is not empty");
    assertEquals(error.code, "disk");
  } finally {
    await Deno.remove(root, { recursive: true });
  }
});

Deno.test("a directory that cannot be made is named", async () => {
  const file = await Deno.makeTempFile();
  try {
    const error = await assertRejects(
      () => workDirectory(`${file}/out`),
      FleetError,
      "Cannot write",
    );
    assertEquals(error.code, "disk");
  } finally {
    await Deno.remove(file);
  }
});
