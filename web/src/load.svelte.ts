// Waiting, done or failed: what a view shows of something it asked for.

import { untrack } from "svelte";

type Question<T> = (signal: AbortSignal) => Promise<T> | undefined;

/** The answer to the latest question; the one before stays until it comes. */
export class Loaded<T> {
  value = $state.raw<T | undefined>(undefined);
  error = $state<string | undefined>(undefined);
  /** True once an answer has been awaited for 300 ms. */
  slow = $state(false);
  /** True after `stop`, until something else is asked. */
  stopped = $state(false);
  #isCurrent = $state(false);
  /** Gives up the answer that is awaited, and the one before; the server stops working on it. */
  stop: () => void = () => {};
  /** Asks the same again. */
  again: () => void = () => {};

  /** The answer to what is asked now, never the one before: what stands beside the name of what is asked. */
  get current(): T | undefined {
    return this.#isCurrent ? this.value : undefined;
  }

  /** Ask; the answer gives the question up. */
  ask(question: Question<T>): () => void {
    const leaving = new AbortController();
    untrack(() => {
      this.stopped = false;
      this.error = undefined; // that of what was asked before
      this.#isCurrent = false;
    });
    const timer = setTimeout(() => (this.slow = true), 300);
    const done = () => {
      clearTimeout(timer);
      this.slow = false;
    };
    this.stop = () => {
      leaving.abort();
      done();
      this.value = undefined;
      this.error = undefined;
      this.stopped = true;
    };
    const answer = question(leaving.signal);
    if (!answer) done();
    answer?.then(
      (value) => {
        if (leaving.signal.aborted) return;
        done();
        this.error = undefined;
        this.value = value;
        this.#isCurrent = true;
      },
      (failure: unknown) => {
        if (leaving.signal.aborted) return;
        done();
        this.value = undefined;
        this.error = failure instanceof Error ? failure.message : String(failure);
      },
    );
    return () => {
      leaving.abort();
      clearTimeout(timer);
    };
  }
}

/** Ask whenever something that `question` reads changes; an overtaken question is aborted. Call it as a component starts. */
export function load<T>(question: Question<T>): Loaded<T> {
  const loaded = new Loaded<T>();
  let asked = $state(0);
  loaded.again = () => asked++;
  $effect(() => {
    void asked;
    return loaded.ask(question);
  });
  return loaded;
}
