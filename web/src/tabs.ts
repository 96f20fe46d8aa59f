// The tabs of the page in their order.

import type { Study } from "./types";

export type TabId = "findings" | "heads" | "patterns" | "patches" | "tokens" | "windows" | "what-if" | "compare";

export interface Tab {
  id: TabId;
  title: string;
  /** What the tab answers, as a question; it stands above its evidence. */
  question: string;
  /** The analyses whose measures the tab shows. */
  analyses: string[];
}

export const TABS: Tab[] = [
  { id: "findings", title: "Findings", question: "What was found?", analyses: ["base"] },
  { id: "heads", title: "Heads", question: "Which heads matter, and why?", analyses: ["heads", "regions", "objects"] },
  { id: "patterns", title: "Patterns", question: "What do heads look like?", analyses: ["patterns"] },
  { id: "patches", title: "Patches", question: "Which patches join?", analyses: ["patches"] },
  { id: "tokens", title: "Tokens", question: "What do tokens carry?", analyses: ["tokens", "exciting"] },
  { id: "windows", title: "Windows", question: "What may a patch see?", analyses: ["head_windows", "windows"] },
  { id: "what-if", title: "What if", question: "What happens if I change something?", analyses: [] },
  { id: "compare", title: "Compare", question: "What differs between two models?", analyses: [] },
];

/** The tab on which a measure is shown: that of its analysis; of an analysis from outside, by what it is a measure of. */
export function tabOf(name: string, study: Study): TabId {
  const analysis = study.analyses.find(({ measures }) => measures.includes(name))?.name;
  const own = TABS.find(({ analyses }) => analysis !== undefined && analyses.includes(analysis));
  if (own) return own.id;
  const dims = study.measures[name]?.dims ?? [];
  if (dims.includes("head")) return "heads";
  if (dims.includes("patch")) return "patches";
  return dims.includes("token") || dims.includes("layer") ? "tokens" : "findings";
}
