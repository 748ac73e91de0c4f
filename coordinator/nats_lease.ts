/**
 * The lease's home: a JetStream KV bucket of the fleet.
 *
 * @module
 */
import type { NatsConnection } from "nats.ws";
import type { LeaseStore } from "./lease.ts";

/**
 * Opens the bucket, making it if need be.
 *
 * @param bucket the fleet's `subjects().state`
 */
export async function natsLeaseStore(
  connection: NatsConnection,
  bucket: string,
): Promise<LeaseStore> {
  const kv = await connection.jetstream().views.kv(bucket, { history: 1 });
  return {
    async get(key) {
      const entry = await kv.get(key);
      return entry && { value: entry.value, revision: entry.revision };
    },
    // The client takes a revision of 0 for "any".
    update: (key, value, revision) =>
      revision === 0 ? kv.create(key, value) : kv.update(key, value, revision),
  };
}
