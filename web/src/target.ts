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
  const image = sentence.images[0];
  if (image) change.image = String(image.image);
  return Object.keys(change).length ? change : undefined;
}
