// Where the screen is written down: the query of the address; in a file its fragment; in a notebook's frame, which has
// no address of its own, the history alone.

import { recording } from "./recorded";

const framed = recording !== undefined && location.protocol === "about:";

/** The screen that the address names, as a query. */
export function read(): string {
  if (!recording) return location.search;
  if (framed) return (history.state as string | null) ?? "";
  return location.hash.replace(/^#/, "");
}

/** Write a screen down, as a new step or in place of the last. */
export function write(query: string, step: "push" | "replace"): void {
  const put = step === "push" ? history.pushState.bind(history) : history.replaceState.bind(history);
  if (framed) put(query, "");
  else put(null, "", recording ? `#${query}` : query);
}

/** Whether the address brings a screen back, so that a link to it can be copied. */
export const hasAddress = !framed;
