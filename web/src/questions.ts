// Questions that take the server long. Those to the live model: the same question of several views is one, an overtaken
// question is dropped, and few are under way at a time, so that no page fills the model's queue however fast a brush moves.
// Those about all images: few at a time too, for a browser has six connections, and pictures come over the others. Pure.

/** Long enough that a stroke of the brush or a held key asks the model once, short enough not to be noticed. */
export const SETTLED_MS = 60;
/** A third of the places in the server's queue: three pages may be busy at once. */
export const UNDER_WAY = 3;
/** The server looks every 0.1 s whether a page is still there: until then a question that was dropped keeps its place. */
export const LEAVES_MS = 300;

/** Questions about all images that are under way at a time: with those to the model a connection is left for pictures. */
export const OVER_IMAGES = 2;

/** Lets few through at a time; the others wait in their order. */
export class Gate {
  #inside = 0;
  #waiting: (() => void)[] = [];

  constructor(readonly places: number) {}

  async pass<T>(work: () => Promise<T>): Promise<T> {
    if (this.#inside >= this.places) await new Promise<void>((go) => this.#waiting.push(go));
    else this.#inside++;
    try {
      return await work();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#inside--;
    }
  }
}

interface Question<T> {
  askers: number;
  leaving: AbortController;
  answer: Promise<T>;
}

export class Questions {
  #open = new Map<string, Question<unknown>>();
  #underWay = 0;
  #waiting: (() => void)[] = [];

  /** Ask by `send`, which is told when nobody waits for the answer any more. */
  ask<T>(key: string, signal: AbortSignal, send: (signal: AbortSignal) => Promise<T>): Promise<T> {
    if (signal.aborted) return Promise.reject(signal.reason);
    const question = (this.#open.get(key) as Question<T> | undefined) ?? this.#begin(key, send);
    question.askers++;
    return new Promise((resolve, reject) => {
      const leave = () => {
        reject(signal.reason);
        question.askers--;
        if (question.askers) return;
        this.#forget(key, question);
        question.leaving.abort(signal.reason);
      };
      signal.addEventListener("abort", leave, { once: true });
      question.answer.then(resolve, reject).finally(() => signal.removeEventListener("abort", leave));
    });
  }

  #begin<T>(key: string, send: (signal: AbortSignal) => Promise<T>): Question<T> {
    const leaving = new AbortController();
    const question = { askers: 0, leaving, answer: this.#answer(leaving.signal, send) };
    this.#open.set(key, question);
    const forget = () => this.#forget(key, question);
    question.answer.then(forget, forget);
    return question;
  }

  #forget(key: string, question: Question<unknown>): void {
    if (this.#open.get(key) === question) this.#open.delete(key);
  }

  async #answer<T>(signal: AbortSignal, send: (signal: AbortSignal) => Promise<T>): Promise<T> {
    await settled(signal);
    while (this.#underWay >= UNDER_WAY) {
      await new Promise<void>((go) => this.#waiting.push(go));
      signal.throwIfAborted();
    }
    this.#underWay++;
    try {
      return await send(signal);
    } finally {
      if (signal.aborted) setTimeout(() => this.#free(), LEAVES_MS);
      else this.#free();
    }
  }

  #free(): void {
    this.#underWay--;
    for (const go of this.#waiting.splice(0)) go();
  }
}

/** Wait until a question has stood for a moment. */
function settled(signal: AbortSignal): Promise<void> {
  return new Promise((go, leave) => {
    const overtaken = () => (clearTimeout(timer), leave(signal.reason));
    const timer = setTimeout(() => (signal.removeEventListener("abort", overtaken), go()), SETTLED_MS);
    signal.addEventListener("abort", overtaken, { once: true });
  });
}
