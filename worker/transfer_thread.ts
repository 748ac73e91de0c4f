/**
 * The transfer thread: downloads parts over a NATS connection of its own, hashes them, and writes the
 * disk cache, so that neither bulk nor hashing ever holds up a beat or a frame.
 *
 * @module
 */
import { directorySource } from "../shared/checkpoint/directory.ts";
import { openCheckpoint } from "../shared/checkpoint/mod.ts";
import { invariant } from "../shared/errors.ts";
import { connectNats, type NatsLink } from "../shared/nats_bus.ts";
import { inboxPrefix } from "../shared/nats_config.ts";
import { parsePartManifest } from "../shared/parts.ts";
import { subjects } from "../shared/protocol.ts";
import { fetchPart } from "../shared/weights.ts";
import { PartCache } from "./cache.ts";
import { PartLibrary } from "./part_library.ts";
import { serveThread } from "./thread.ts";
import type { TransferCalls, TransferOptions } from "./transfer_calls.ts";

let library: PartLibrary | null = null;
let link: Promise<NatsLink> | null = null;

serveThread<TransferCalls>({
  async open(options, { tell }) {
    const { cache: { directory, limitBytes }, modelDirectory, prefix } = options;
    const shardsOf = (manifest: Uint8Array) => parsePartManifest(manifest).shards;
    const cache = await PartCache.open({ directory, limitBytes, shardsOf });
    const { bucket } = subjects(prefix);
    library = new PartLibrary({
      cache,
      fetch: async (part, onProgress, signal) => {
        const { connection } = await connected(options);
        return await fetchPart({ connection, bucket, part, store: cache, onProgress, signal });
      },
      checkpoint: modelDirectory === undefined ? undefined : {
        directory: modelDirectory,
        checkpoint: await openCheckpoint(directorySource(modelDirectory)),
      },
      log: tell,
    });
    return { held: library.held() };
  },

  async provide({ parts }, { tell, signal }) {
    invariant(library, "the library is open");
    const locations = await library.provide(parts, tell, signal);
    return { locations, held: library.held() };
  },

  async close() {
    const open = await link?.catch(() => null);
    await open?.bus.close();
  },
});

/** Connects at the first need; a failed attempt is repeated at the next. */
function connected({ nats }: TransferOptions): Promise<NatsLink> {
  link ??= connectNats({
    ...nats,
    name: `${nats.name}-transfer`,
    // The worker's user may hear answers nowhere else.
    inboxPrefix: inboxPrefix(nats.name),
  }).catch((error) => {
    link = null;
    throw error;
  });
  return link;
}
