// Every overlay of a study, in the order in which a tab lists them.

import type { TabId } from "../tabs";
import type { Study } from "../types";
import { ATTENTION } from "./attention";
import { RELEVANCE, TOKENS } from "./look";
import type { Overlay } from "./overlay";
import { storedOverlays } from "./stored";
import { WHAT_IF } from "./what_if";

export const overlaysOf = (study: Study): Overlay[] => [
  ...ATTENTION,
  ...WHAT_IF,
  ...TOKENS,
  ...storedOverlays(study),
  ...RELEVANCE,
];

/** Those of a tab first, the others after them. */
export function listed(overlays: Overlay[], tab: TabId): { own: Overlay[]; others: Overlay[] } {
  const belongs = (overlay: Overlay) => overlay.tabs.includes(tab);
  return { own: overlays.filter(belongs), others: overlays.filter((each) => !belongs(each)) };
}

/** What is drawn: the overlay asked for, else the tab's first that can be drawn now, else its first, which then waits. */
export function chosenOverlay(overlays: Overlay[], asked: string, tab: TabId, live: boolean): Overlay | undefined {
  if (asked === "none") return undefined;
  const named = overlays.find(({ id }) => id === asked);
  if (named) return named;
  const { own, others } = listed(overlays, tab);
  const candidates = own.length ? own : others.filter(({ id }) => id === "looks");
  return candidates.find((each) => live || !each.live) ?? candidates[0];
}
