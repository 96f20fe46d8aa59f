// Which stored measures a tab shows: every one of the study is on exactly one tab.

import { tabOf, type TabId } from "../tabs";
import type { Study } from "../types";

/** The measures of a tab under the titles of their analyses, in the order of the study. */
export function measuresOf(tab: TabId, study: Study): { title: string; names: string[] }[] {
  return study.analyses
    .map(({ title, stored }) => ({
      title,
      names: stored.filter((name) => name in study.measures && tabOf(name, study) === tab),
    }))
    .filter(({ names }) => names.length);
}
