/**
 * Server-sent events over `fetch`, which unlike `EventSource` can send an API key. For the page and
 * for the command line alike.
 *
 * @module
 */

/**
 * The payloads of a stream's `data:` fields, one string per event.
 *
 * @param {ReadableStream<Uint8Array>} body a `text/event-stream`
 * @returns {AsyncGenerator<string, void, void>}
 */
export async function* eventPayloads(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  /** @type {string[]} */
  let data = [];
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    await reader.cancel();
  }
}
