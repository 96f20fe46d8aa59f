// Waiting, done or failed: what a view shows of something it asked for.

import { untrack } from "svelte";

/** The answer to the latest question; the one before stays until it comes. */
export class Loaded<T> {
  value = $state.raw<T | undefined>(undefined);
  error = $state<string | undefined>(undefined);
  /** True once an answer has been awaited for 300 ms. */
  slow = $state(false);
  /** True after `stop`, until something else is asked. */
  stopped = $state(false);
  /** Gives up the answer that is awaited; the server stops working on it. */
  stop: () => void = () => {};
  /** Asks the same again. */
  again: () => void = () => {};
}

/** Ask whenever something that `question` reads changes; an overtaken question is aborted. Call it as a component starts. */
export function load<T>(question: (signal: AbortSignal) => Promise<T> | undefined): Loaded<T> {
  const loaded = new Loaded<T>();
  let asked = $state(0);
  loaded.again = () => asked++;
  $effect(() => {
    void asked;
    const leaving = new AbortController();
    untrack(() => (loaded.stopped = false));
    const timer = setTimeout(() => (loaded.slow = true), 300);
    const done = () => {
      clearTimeout(timer);
      loaded.slow = false;
    };
    loaded.stop = () => {
      leaving.abort();
      done();
      loaded.stopped = true;
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
