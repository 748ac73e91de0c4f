import { assert, assertEquals, assertNotEquals, assertRejects } from "@std/assert";
import { FleetError } from "../shared/errors.ts";
import { parseFlags } from "../shared/flags.ts";
import { COMMAND, prepare } from "./nats.ts";

function flags(dir: string, ...args: string[]) {
  return parseFlags(COMMAND, ["--dir", dir, ...args], () => undefined).values;
}

Deno.test("deno task nats", async (t) => {
  const dir = await Deno.makeTempDir();

  await t.step("is open on loopback by default, and writes no credentials", async () => {
    const { config, credentialsFiles, warnings } = await prepare(flags(dir));
    assert(config.includes('host: "127.0.0.1"') && config.includes("no_auth_user"));
    assertEquals([credentialsFiles, warnings], [[], []]);
  });

  await t.step(
    "keeps passwords in files that only their owner reads, and out of sight",
    async () => {
      const { config, credentialsFiles } = await prepare(flags(dir, "--workers", "a,b"));
      assertEquals(credentialsFiles.map((f) => f.slice(dir.length)), [
        "/coordinator.auth",
        "/a.auth",
        "/b.auth",
      ]);
      for (const file of [...credentialsFiles, `${dir}/passwords.conf`]) {
        assertEquals((await Deno.stat(file)).mode! & 0o777, 0o600, file);
      }
      for (const file of credentialsFiles) {
        const [, password] = (await Deno.readTextFile(file)).trim().split(":");
        assertEquals(password.length, 48);
        assert(!config.includes(password));
      }
    },
  );

  await t.step("a worker more changes nobody's password", async () => {
    const before = await Deno.readTextFile(`${dir}/a.auth`);
    await prepare(flags(dir, "--workers", "a,b,c"));
    assertEquals(await Deno.readTextFile(`${dir}/a.auth`), before);
    assertNotEquals((await Deno.readTextFile(`${dir}/c.auth`)).slice(2), before.slice(2));
  });

  await t.step("what is only printed leaves the configuration in use alone", async () => {
    const { configFile, config } = await prepare(flags(dir, "--workers", "a,b,c"));
    const printed = await prepare(flags(dir, "--print"));
    assertNotEquals(printed.config, config);
    assertEquals(await Deno.readTextFile(configFile), config);
  });

  await t.step("the configuration is one that nats-server accepts", async () => {
    const { configFile } = await prepare(flags(dir, "--workers", "a,b-2,c_3"));
    const check = await new Deno.Command("nats-server", { args: ["-t", "-c", configFile] })
      .output();
    assertEquals(check.code, 0, new TextDecoder().decode(check.stderr));
  });

  await t.step("refuses what would be unsafe or wrong", async () => {
    const refusals: [args: string[], reason: string][] = [
      [["--listen", "0.0.0.0:9222"], "--workers"],
      [["--listen", "nowhere"], "HOST:PORT"],
      [["--listen", "127.0.0.1:99999"], "HOST:PORT"],
      [["--tls-cert", "x.pem"], "go together"],
      [["--tls-cert", "/no/cert.pem", "--tls-key", "/no/key.pem"], "no file"],
      [["--workers", "a.b"], "cannot be a worker's name"],
      [["--workers", "coordinator"], "cannot be a worker's name"],
      [["--workers", "a,a"], "cannot be a worker's name"],
    ];
    for (const [args, reason] of refusals) {
      const error = await assertRejects(() => prepare(flags(dir, ...args)), FleetError, reason);
      assertEquals(error.code, "bad-usage");
    }
    await Deno.writeTextFile(`${dir}/d.auth`, "e:password");
    await assertRejects(() => prepare(flags(dir, "--workers", "d")), FleetError, "d.auth");
  });

  await t.step("warns when passwords would cross a network in clear", async () => {
    const { warnings } = await prepare(flags(dir, "--listen", "[::]:9222", "--workers", "a"));
    assertEquals(warnings.length, 1);
  });

  await Deno.remove(dir, { recursive: true });
});
