/**
 * What NATS itself says of lost connections, within milliseconds: sooner than missed beats.
 *
 * @module
 */
import { z } from "zod";
import type { Bus, Subscription } from "../shared/bus.ts";
import { DISCONNECT_SUBJECT } from "../shared/nats_config.ts";
import { decodeControl } from "../shared/protocol.ts";

const Disconnect = z.object({ client: z.object({ name: z.string().optional() }) });

/**
 * Calls `onDisconnect` with the name of every connection that ends. A server without the fleet's
 * account simply says nothing; beats tell the same a little later.
 */
export function watchDisconnects(bus: Bus, onDisconnect: (name: string) => void): Subscription {
  return bus.subscribe(DISCONNECT_SUBJECT, ({ data }) => {
    try {
      const { client } = decodeControl(Disconnect, data);
      if (client.name) onDisconnect(client.name);
    } catch { /* not what a nats-server says: nothing to act on */ }
  });
}
