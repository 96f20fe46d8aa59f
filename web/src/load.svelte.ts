// Waiting, done or failed: what a view shows of something it asked for.

/** The answer to the latest question; the one before stays until it comes. */
export class Loaded<T> {
  value = $state.raw<T | undefined>(undefined);
  error = $state<string | undefined>(undefined);
  /** True once an answer has been awaited for 300 ms. */
  slow = $state(false);
}

/** Ask whenever something that `question` reads changes; an overtaken question is aborted. Call it as a component starts. */
export function load<T>(question: (signal: AbortSignal) => Promise<T> | undefined): Loaded<T> {
  const loaded = new Loaded<T>();
  $effect(() => {
    const leaving = new AbortController();
    const timer = setTimeout(() => (loaded.slow = true), 300);
    const done = () => {
      clearTimeout(timer);
      loaded.slow = false;
    };
    const answer = question(leaving.signal);
    if (!answer) done();
    answer?.then(
      (value) => {
        if (leaving.signal.aborted) return;
        done();
        loaded.error = undefined;
        loaded.value = value;
      },
      (failure: unknown) => {
        if (leaving.signal.aborted) return;
        done();
        loaded.value = undefined;
        loaded.error = failure instanceof Error ? failure.message : String(failure);
      },
    );
    return () => {
      leaving.abort();
      clearTimeout(timer);
    };
  });
  return loaded;
}
