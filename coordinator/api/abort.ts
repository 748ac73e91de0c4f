/**
 * Calling a request's work off.
 *
 * @module
 */

/** A controller that follows `signal`, and may be aborted for reasons of our own. */
export function abortWith(signal: AbortSignal): AbortController {
  const abort = new AbortController();
  if (signal.aborted) abort.abort(signal.reason);
  signal.addEventListener("abort", () => abort.abort(signal.reason), { once: true });
  return abort;
}
