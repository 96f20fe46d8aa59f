// Whether the model behind the page is open. The page is there before it, and asks nothing of it until it is ready.

import { live } from "./api";
import type { Live } from "./types";

const ASK_AGAIN_MS = 700;

class LiveModel {
  state = $state<Live["state"]>("none");
  reason = $state("");

  /** Follow a model that is still being opened. */
  follow(first: Live): void {
    this.#take(first);
    if (first.state === "loading") setTimeout(() => this.#ask(), ASK_AGAIN_MS);
  }

  #take({ state, reason }: Live): void {
    this.state = state;
    this.reason = reason;
  }

  async #ask(): Promise<void> {
    try {
      this.follow(await live());
    } catch (failure) {
      this.#take({ state: "failed", reason: failure instanceof Error ? failure.message : String(failure) });
    }
  }
}

export const model = new LiveModel();
