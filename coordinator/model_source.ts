/**
 * A checkpoint on its way into the fleet: cut into parts, put into the object store, described for
 * plans.
 *
 * @module
 */
import type { NatsConnection } from "nats.ws";
import { assertFinite, type Checkpoint, formatName } from "../shared/checkpoint/mod.ts";
import { systemClock } from "../shared/clock.ts";
import { DTYPE_BYTES } from "../shared/model_config.ts";
import { describeParts } from "../shared/parts.ts";
import { publishParts } from "../shared/weights.ts";
import type { FleetModel } from "./fleet_options.ts";

/** Where a model comes from and goes to. */
export interface PublishOptions {
  /** The checkpoint's directory; its last name is the model's id when `name` is absent. */
  directory: string;
  name?: string;
  connection: NatsConnection;
  /** `subjects(prefix).bucket` */
  bucket: string;
  /** False: every worker has the checkpoint on its own disk. */
  upload: boolean;
  log: (line: string) => void;
}

/** A line of progress at most this often. */
const PROGRESS_EVERY_MS = 2_000;

/**
 * Hashes the checkpoint, checks that its values are numbers, uploads what the store lacks (unless told
 * not to), and says what the fleet serves.
 *
 * @throws FleetError as `describeParts` and `publishParts` do
 */
export async function publishModel(
  checkpoint: Checkpoint,
  options: PublishOptions,
): Promise<FleetModel> {
  const { connection, bucket, log } = options;
  const id = options.name ?? modelId(options.directory);
  const totalBytes = checkpoint.names()
    .reduce((sum, name) => sum + checkpoint.info(name).bytes, 0);
  const hashed = progressLine((line) => log(`${id}: hashing ${line}`));
  const manifest = await describeParts(withFiniteValues(checkpoint), {
    onProgress: (doneBytes) => hashed({ doneBytes, totalBytes }),
  });
  if (options.upload) {
    const published = await publishParts({
      connection,
      bucket,
      tensors: checkpoint,
      model: manifest,
      onProgress: progressLine((line) => log(`${id}: uploading ${line}`)),
    });
    log(
      `${id}: ${size(published.totalBytes)} in the object store, ` +
        `${size(published.uploadedBytes)} of it new`,
    );
  }
  const { config, configJson } = checkpoint;
  return {
    id,
    createdUnix: Math.floor(systemClock.unixMs() / 1000),
    format: config.codegemm ? formatName(config.codegemm) : "float16",
    config,
    configJson,
    digest: manifest.digest,
    parts: manifest.parts.map(({ ref }) => ref),
  };
}

/**
 * The same checkpoint; whoever reads a value through it that is no number gets an error instead. A
 * damaged checkpoint should be known by its tensor's name here, not by the workers that fail to load it.
 */
function withFiniteValues(checkpoint: Checkpoint): Checkpoint {
  return {
    ...checkpoint,
    async read(name, offset, length) {
      const bytes = await checkpoint.read(name, offset, length);
      const { dtype } = checkpoint.info(name);
      assertFinite(name, dtype, bytes, offset / DTYPE_BYTES[dtype]);
      return bytes;
    },
  };
}

/** The directory's last name. */
function modelId(directory: string): string {
  return directory.replace(/[/\\]+$/, "").split(/[/\\]/).at(-1) || "model";
}

function progressLine(log: (line: string) => void) {
  let lastMs = systemClock.nowMs();
  return ({ doneBytes, totalBytes }: { doneBytes: number; totalBytes: number }) => {
    const nowMs = systemClock.nowMs();
    if (nowMs - lastMs < PROGRESS_EVERY_MS) return;
    lastMs = nowMs;
    log(`${size(doneBytes)} of ${size(totalBytes)}`);
  };
}

function size(bytes: number): string {
  return bytes < 2 ** 30
    ? `${(bytes / 2 ** 20).toFixed(1)} MiB`
    : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
