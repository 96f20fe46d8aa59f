// Where a sentence leads: the change of the shared state that shows what it speaks of.

import { headMetrics } from "./metrics";
import type { Shared } from "./state.svelte";
import { tabOf } from "./tabs";
import type { Sentence, Study } from "./types";

/** The change, or undefined for a sentence that singles nothing out. */
export function targetOf(sentence: Sentence, study: Study): Partial<Shared> | undefined {
  const change: Partial<Shared> = {};
  if (sentence.measure in study.measures) {
    const tab = tabOf(sentence.measure, study);
    if (tab !== "findings") change.tab = tab;
    if (headMetrics(study).includes(sentence.measure)) change.metric = sentence.measure;
    else change.measure = sentence.measure;
  }
  if (sentence.layer !== null) {
    change.layer = sentence.layer;
    if (sentence.head !== null) change.head = sentence.head;
  }
  return Object.keys(change).length ? change : undefined;
}

/** The change that a photograph below a sentence makes: what the sentence speaks of, in that image; of no head in
 * particular, what every head does there. */
export function targetOfImage(sentence: Sentence, image: number, study: Study): Partial<Shared> {
  const target = targetOf(sentence, study) ?? {};
  const ofHeads = headMetrics(study).length > 0;
  const tab = target.tab ?? (ofHeads ? "heads" : "tokens");
  const everyHead = sentence.layer === null && tab === "heads";
  const grid: Partial<Shared> = everyHead ? { scope: "image", cells: "numbers" } : { scope: "set", cells: "" };
  return { ...target, ...grid, tab, image: String(image) };
}

/** The view of this tab that draws the numbers of a sentence. */
export const chartOf = ({ metric }: Partial<Shared>, tab: string): string => (metric ? "certainty" : `every-${tab}`);
