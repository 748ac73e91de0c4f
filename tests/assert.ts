/**
 * The part of `@std/assert` that the tests use, over `node:assert/strict`, with the same names and
 * argument order. The import map points `@std/assert` here; one changed line there switches to JSR's.
 *
 * @module
 */
import strict, { AssertionError } from "node:assert/strict";

export { AssertionError };

/** Fails unless `condition` is truthy. */
export function assert(condition: unknown, message?: string): asserts condition {
  strict.ok(condition, message);
}

/** Deep, strict equality of structure. */
export function assertEquals<T>(actual: T, expected: T, message?: string): void {
  strict.deepStrictEqual(actual, expected, message);
}

/** The opposite of {@linkcode assertEquals}. */
export function assertNotEquals<T>(actual: T, expected: T, message?: string): void {
  strict.notDeepStrictEqual(actual, expected, message);
}

/** `Object.is` equality. */
export function assertStrictEquals<T>(actual: T, expected: T, message?: string): void {
  strict.strictEqual(actual, expected, message);
}

/** `|actual - expected| <= tolerance`; NaN never passes. */
export function assertAlmostEquals(
  actual: number,
  expected: number,
  tolerance = 1e-7,
  message = `${actual} is not within ${tolerance} of ${expected}`,
): void {
  if (Object.is(actual, expected)) return;
  strict.ok(Math.abs(actual - expected) <= tolerance, message);
}

/** `actual > expected`. */
export function assertGreater(actual: number, expected: number, message?: string): void {
  strict.ok(actual > expected, message ?? `${actual} is not greater than ${expected}`);
}

/** `actual >= expected`. */
export function assertGreaterOrEqual(actual: number, expected: number, message?: string): void {
  strict.ok(actual >= expected, message ?? `${actual} is less than ${expected}`);
}

/** `actual < expected`. */
export function assertLess(actual: number, expected: number, message?: string): void {
  strict.ok(actual < expected, message ?? `${actual} is not less than ${expected}`);
}

/** `actual <= expected`. */
export function assertLessOrEqual(actual: number, expected: number, message?: string): void {
  strict.ok(actual <= expected, message ?? `${actual} is greater than ${expected}`);
}

/** `actual` contains `expected` as a substring. */
export function assertStringIncludes(actual: string, expected: string, message?: string): void {
  strict.ok(
    actual.includes(expected),
    message ?? `${JSON.stringify(actual)} does not include ${JSON.stringify(expected)}`,
  );
}

/** `actual` matches `pattern`. */
export function assertMatch(actual: string, pattern: RegExp, message?: string): void {
  strict.match(actual, pattern, message);
}

/** `actual` is neither null nor undefined. */
export function assertExists<T>(actual: T, message?: string): asserts actual is NonNullable<T> {
  strict.ok(actual !== null && actual !== undefined, message ?? "the value does not exist");
}

// deno-lint-ignore no-explicit-any
type ErrorClass<E extends Error> = abstract new (...args: any[]) => E;

/** `actual` is an instance of `type`. */
export function assertInstanceOf<T>(
  actual: unknown,
  // deno-lint-ignore no-explicit-any
  type: abstract new (...args: any[]) => T,
  message?: string,
): asserts actual is T {
  strict.ok(actual instanceof type, message ?? `the value is not an instance of ${type.name}`);
}

function checked<E extends Error>(error: unknown, type?: ErrorClass<E>, includes?: string): E {
  strict.ok(error instanceof Error, "what was thrown is not an Error");
  if (type) strict.ok(error instanceof type, `expected ${type.name}, got ${error.stack}`);
  if (includes !== undefined) assertStringIncludes(error.message, includes);
  return error as E;
}

/** `fn` throws (an instance of `type` whose message includes `includes`); returns what it threw. */
export function assertThrows<E extends Error = Error>(
  fn: () => unknown,
  type?: ErrorClass<E>,
  includes?: string,
): E {
  let thrown: unknown;
  try {
    fn();
  } catch (error) {
    thrown = error;
  }
  strict.ok(thrown !== undefined, "expected the function to throw");
  return checked(thrown, type, includes);
}

/** `fn` rejects (with an instance of `type` whose message includes `includes`); returns the error. */
export async function assertRejects<E extends Error = Error>(
  fn: () => PromiseLike<unknown>,
  type?: ErrorClass<E>,
  includes?: string,
): Promise<E> {
  let thrown: unknown;
  try {
    await fn();
  } catch (error) {
    thrown = error;
  }
  strict.ok(thrown !== undefined, "expected the function to reject");
  return checked(thrown, type, includes);
}

/** Always fails. */
export function fail(message = "failed"): never {
  strict.fail(message);
}
