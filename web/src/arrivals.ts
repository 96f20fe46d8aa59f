// Arrays of a photograph of the visitor's own come part by part; who asks for one goes on once it is there. Pure.

export class Arrivals {
  #here = new Set<string>();
  #isOver = false;
  #waiting: (() => void)[] = [];

  put(names: Iterable<string>): void {
    for (const name of names) this.#here.add(name);
    this.#wake();
  }

  /** Nothing further comes: whoever still waits asks, and is told why there is nothing. */
  end(): void {
    this.#isOver = true;
    this.#wake();
  }

  async of(name: string): Promise<void> {
    while (!this.#here.has(name) && !this.#isOver) await new Promise<void>((go) => this.#waiting.push(go));
  }

  #wake(): void {
    for (const go of this.#waiting.splice(0)) go();
  }
}
