// What each key does.

import { shared } from "./state.svelte";
import type { Study } from "./types";

export const KEYS: [string, string][] = [
  ["← →", "previous, next head"],
  ["↑ ↓", "layer before, layer after"],
  ["[ ]", "previous, next image of the selection"],
  ["1 … 6", "region mode"],
  ["s", "one image or the selected set"],
  ["t", "class token or centre patch as query"],
  ["/", "search images"],
  ["Esc", "clear the selection, close"],
  ["?", "this list"],
  ["Tab, arrows", "reach a view; arrows move the query patch in the photograph"],
];

export interface Moves {
  study: Study;
  /** The image `steps` further in the selection. */
  image: (steps: number) => string;
  search: () => void;
  help: () => void;
  centre: () => number;
}

const TYPING = "input, select, textarea, [contenteditable]";

/** Act on a key pressed anywhere but in a field; answers whether it meant something. */
export function pressed(event: KeyboardEvent, moves: Moves): boolean {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return false;
  if ((event.target as Element).matches?.(TYPING) || document.querySelector("dialog[open]")) return false;
  const { layer, head } = shared;
  const heads = moves.study.n_heads;
  const write = (change: Parameters<typeof shared.write>[0]) => (shared.write(change, "keyboard"), true);
  switch (event.key) {
    case "ArrowRight":
      return head + 1 < heads[layer]! ? write({ head: head + 1 }) : layer + 1 < heads.length && write({ layer: layer + 1, head: 0 });
    case "ArrowLeft":
      return head > 0 ? write({ head: head - 1 }) : layer > 0 && write({ layer: layer - 1, head: heads[layer - 1]! - 1 });
    case "ArrowDown":
      return write({ layer: layer + 1 });
    case "ArrowUp":
      return write({ layer: layer - 1 });
    case "[":
    case "]":
      return write({ image: moves.image(event.key === "]" ? 1 : -1) });
    case "s":
      return write({ scope: shared.scope === "set" ? "image" : "set" });
    case "t":
      return write({ token: shared.token === 0 ? moves.centre() : 0 });
    case "Escape":
      return shared.brush !== "" && write({ brush: "" });
    case "/":
      return moves.search(), true;
    case "?":
      return moves.help(), true;
  }
  return /^[1-6]$/.test(event.key) && write({ mode: Number(event.key) });
}
