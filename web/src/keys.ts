// What each key does.

import { shared } from "./state.svelte";
import { TABS } from "./tabs";
import type { Study } from "./types";

export const KEYS: [string, string][] = [
  ["1 … 8", "tabs"],
  ["← →", "previous, next head"],
  ["↑ ↓", "layer before, layer after"],
  ["[ ]", "previous, next image of the selection"],
  ["o", "the photograph alone, or the overlay again"],
  ["s", "heads of this image, or of the selected images"],
  ["t", "seen from the class token, or from the last patch"],
  ["/", "search images"],
  ["Esc", "clear the selection, close"],
  ["?", "this list"],
  ["+ − 0", "on the map of images: magnify, the whole map; arrows move it"],
  ["Tab, then arrows", "inside the photograph: move over its patches; inside the images: choose one"],
];

export interface Moves {
  study: Study;
  /** The image `steps` further in the selection. */
  image: (steps: number) => string;
  search: () => void;
  help: () => void;
}

const TYPING = "input:not([type=checkbox], [type=range]), select, textarea, [contenteditable]";
/** Moved by the arrows themselves. */
const SLIDER = "input[type=range]";
let lastOverlay = "";
let lastPatch = 0;

/** Act on a key pressed anywhere but in a field; answers whether it meant something. */
export function pressed(event: KeyboardEvent, moves: Moves): boolean {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return false;
  const within = event.target as Element;
  if (within.matches?.(TYPING) || document.querySelector("dialog[open]")) return false;
  if (event.key.startsWith("Arrow") && within.matches?.(SLIDER)) return false;
  const { layer, head } = shared;
  const heads = moves.study.n_heads;
  const write = (change: Parameters<typeof shared.write>[0]) => (shared.write(change, "keyboard"), true);
  switch (event.key) {
    case "ArrowRight":
      return head + 1 < heads[layer]!
        ? write({ head: head + 1 })
        : layer + 1 < heads.length && write({ layer: layer + 1, head: 0 });
    case "ArrowLeft":
      return head > 0
        ? write({ head: head - 1 })
        : layer > 0 && write({ layer: layer - 1, head: heads[layer - 1]! - 1 });
    case "ArrowDown":
      return write({ layer: layer + 1 });
    case "ArrowUp":
      return write({ layer: layer - 1 });
    case "[":
    case "]":
      return write({ image: moves.image(event.key === "]" ? 1 : -1) });
    case "s":
      return write({ scope: shared.scope === "set" ? "image" : "set" });
    case "o":
      if (shared.overlay === "none") return write({ overlay: lastOverlay });
      lastOverlay = shared.overlay;
      return write({ overlay: "none" });
    case "t": {
      const prefix = moves.study.prefixes[layer] ?? 0;
      if (shared.token < prefix) return write({ token: lastPatch || prefix });
      lastPatch = shared.token;
      return prefix > 0 && write({ token: 0 });
    }
    case "Escape":
      return shared.brush !== "" && write({ brush: "" });
    case "/":
      return (moves.search(), true);
    case "?":
      return (moves.help(), true);
  }
  const tab = /^[1-8]$/.test(event.key) ? TABS[Number(event.key) - 1] : undefined;
  return tab !== undefined && write({ tab: tab.id, overlay: "" });
}
