// Answers that are kept once asked for, in a bounded number of bytes: those used longest ago go first. Pure.

interface Entry<T> {
  answer: Promise<T>;
  /** Once it is there. */
  held?: { value: T; bytes: number };
}

export class Kept<T> {
  #entries = new Map<string, Entry<T>>();
  #latest = "";
  #bytes = 0;

  constructor(
    /** In bytes; the answer used last is kept however large it is. */
    readonly most: number,
    readonly size: (value: T) => number = bytesOf,
    /** Frees what an answer holds beside its own bytes, as it goes. */
    readonly drop: (value: T) => void = () => {},
  ) {}

  /** The answer to what was asked before, there or on its way. */
  get<U extends T>(key: string): Promise<U> | undefined {
    const entry = this.#entries.get(key);
    if (entry) this.#put(key, entry);
    return entry?.answer as Promise<U> | undefined;
  }

  /** The same; asks where nothing is kept. A refusal is not. */
  once<U extends T>(key: string, ask: () => Promise<U>): Promise<U> {
    const known = this.get<U>(key);
    if (known) return known;
    const answer = ask();
    const entry: Entry<T> = { answer };
    this.#put(key, entry);
    answer.then(
      (value) => this.#hold(entry, value),
      () => this.#entries.delete(key),
    );
    return answer;
  }

  #put(key: string, entry: Entry<T>): void {
    this.#entries.delete(key);
    this.#entries.set(key, entry);
    this.#latest = key;
  }

  #hold(entry: Entry<T>, value: T): void {
    entry.held = { value, bytes: this.size(value) };
    this.#bytes += entry.held.bytes;
    for (const [key, { held }] of this.#entries) {
      if (this.#bytes <= this.most) return;
      if (!held || key === this.#latest) continue;
      this.#entries.delete(key);
      this.#bytes -= held.bytes;
      this.drop(held.value);
    }
  }
}

/** About how much memory an answer takes: what its arrays hold, wherever in it they are. */
export function bytesOf(answer: unknown): number {
  if (ArrayBuffer.isView(answer)) return answer.byteLength;
  if (typeof answer === "string") return 2 * answer.length;
  if (typeof answer !== "object" || answer === null) return 8;
  return Object.values(answer).reduce((sum: number, part) => sum + bytesOf(part), 0);
}
