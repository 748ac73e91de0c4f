import { assertEquals, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { requireSpace, workDirectory } from "./directory.ts";

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

Deno.test("work that the disk has no room for is refused, what lies there already counted in", async () => {
  const path = await Deno.makeTempDir();
  try {
    const { work } = await workDirectory(path);
    await work.write("float-0.f16", 0, new Uint8Array(1000));
    await requireSpace(path, 3000, () => Promise.resolve(2000));
    const error = await assertRejects(
      () => requireSpace(path, 2 ** 31 + 1000, () => Promise.resolve(2 ** 30)),
      FleetError,
      "2.00 GiB are needed for the work and its result, 1.00 GiB are free",
    );
    assertEquals(error.code, "disk");
    await requireSpace(path, 1); // The real disk.
    await assertRejects(() => requireSpace(path, 2 ** 60), FleetError, "too full");
  } finally {
    await Deno.remove(path, { recursive: true });
  }
});

Deno.test("a write that fails names its file", async () => {
  // Everything written here meets a full disk.
  if (!await exists("/dev/full")) return;
  const path = await Deno.makeTempDir();
  try {
    const { work } = await workDirectory(path);
    await Deno.symlink("/dev/full", `${path}/.quantize/state.json.new`);
    const error = await assertRejects(
      () => work.write("state.json.new", 0, Uint8Array.of(1)),
      FleetError,
      `Cannot write ${path}/.quantize/state.json.new: No space left on device`,
    );
    assertEquals(error.code, "disk");
  } finally {
    await Deno.remove(path, { recursive: true });
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
