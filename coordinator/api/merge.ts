/**
 * Many streams as one, in the order in which their values come.
 *
 * @module
 */

/**
 * Yields the values of all `sources`. Each source is asked for its next value when its last one was
 * taken, so a slow reader slows every source. The first failure is thrown, after the values that
 * came before it.
 *
 * @param onEnd called when the reader stops early or a source fails while others go on; it must make
 * every source end, for an iterator that waits cannot be returned from outside
 */
export async function* merge<T>(
  sources: readonly AsyncIterable<T>[],
  onEnd: (reason: unknown) => void,
): AsyncGenerator<T> {
  const ready: { value: T; taken: () => void }[] = [];
  const failures: unknown[] = [];
  let open = sources.length;
  let closed = false;
  let wake = () => {};
  let release = () => {};
  const pump = async (source: AsyncIterable<T>) => {
    try {
      for await (const value of source) {
        if (closed) break;
        await new Promise<void>((taken) => {
          ready.push({ value, taken });
          wake();
        });
        if (closed) break;
      }
    } catch (error) {
      failures.push(error);
    }
    open--;
    wake();
  };
  for (const source of sources) pump(source);
  try {
    while (true) {
      const next = ready.shift();
      if (next) {
        release = next.taken;
        yield next.value;
        release();
      } else if (failures.length > 0) throw failures[0];
      else if (open === 0) return;
      else await new Promise<void>((resolve) => wake = resolve);
    }
  } finally {
    closed = true;
    if (open > 0) onEnd(failures[0]);
    release();
    for (const { taken } of ready) taken();
  }
}
