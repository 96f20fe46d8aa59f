// What is changed on the tab "What if", as a text that fits in the URL.
//
//   L2H0            a head that is off              L2H0:3                 a region of its map (modes 2 to 6)
//   patches:3,8-11  patches, row by row              black                  what is done to them; the mean if absent
//   window:L3H1:17:2,2,5,2   sides left, top, right, bottom of a window; "all" for the layer's heads, or all patches
//
// Parts are joined by "~".

import { headName } from "./format";
import { gridOf, tokenName } from "./grids";
import type { Study } from "./types";

export const HOW = ["mean", "black", "removed", "shuffled"] as const;
export type How = (typeof HOW)[number];
export const HOW_WORDS: Record<How, string> = {
  mean: "the mean colour",
  black: "black",
  removed: "taken out",
  shuffled: "shuffled",
};

export interface Window {
  layer: number;
  head: number | null;
  patch: number | null;
  sides: [number, number, number, number];
}

export interface Changes {
  heads: [number, number][];
  modes: [number, number, number][];
  patches: number[];
  how: How;
  windows: Window[];
}

/** The changes of a text, and the parts of it that this model does not have. */
export function parseChanges(text: string, about: Study): Changes & { gone: string[] } {
  const changes: Changes = { heads: [], modes: [], patches: [], how: "mean", windows: [] };
  const gone: string[] = [];
  for (const part of text.split("~").filter(Boolean)) if (!take(part, changes, about)) gone.push(part);
  return { ...changes, gone };
}

function take(part: string, changes: Changes, about: Study): boolean {
  if ((HOW as readonly string[]).includes(part)) return ((changes.how = part as How), true);
  const head = /^L(\d+)H(\d+)(?::([2-6]))?$/.exec(part);
  if (head) {
    const [layer, number, mode] = head.slice(1).map(Number) as [number, number, number];
    if (!(number < (about.n_heads[layer] ?? 0))) return false;
    if (head[3]) changes.modes.push([layer, number, mode]);
    else changes.heads.push([layer, number]);
    return true;
  }
  if (part.startsWith("patches:")) {
    const [rows, columns] = gridOf(about, 0);
    const patches = [...new Set(part.slice(8).split(",").flatMap(range))];
    changes.patches = patches.filter((patch) => patch < rows * columns);
    return changes.patches.length === patches.length;
  }
  const window = /^window:L(\d+)(?:H(\d+)|all):(\d+|all):(\d+),(\d+),(\d+),(\d+)$/.exec(part);
  if (!window) return false;
  const [layer, number] = [Number(window[1]), window[2] === undefined ? null : Number(window[2])];
  const patch = window[3] === "all" ? null : Number(window[3]);
  if (!((number ?? 0) < (about.n_heads[layer] ?? 0))) return false;
  const [rows, columns] = gridOf(about, layer);
  if ((patch ?? 0) >= rows * columns) return false;
  changes.windows.push({ layer, head: number, patch, sides: window.slice(4).map(Number) as Window["sides"] });
  return true;
}

function range(text: string): number[] {
  const [first, last = first] = text.split("-").map(Number) as [number, number?];
  if (!Number.isInteger(first) || !Number.isInteger(last)) return [];
  return Array.from({ length: Math.max(0, last! - first + 1) }, (_, i) => first + i);
}

/** The text of some changes: `parseChanges` of it gives them back. */
export function changesText({ heads, modes, patches, how, windows }: Changes): string {
  return [
    ...heads.map(([layer, head]) => headName(layer, head)),
    ...modes.map(([layer, head, mode]) => `${headName(layer, head)}:${mode}`),
    ...(patches.length ? [`patches:${ranges(patches)}`] : []),
    ...(how === "mean" ? [] : [how]),
    ...windows.map(
      ({ layer, head, patch, sides }) =>
        `window:L${layer}${head === null ? "all" : `H${head}`}:${patch ?? "all"}:${sides.join()}`,
    ),
  ].join("~");
}

function ranges(patches: number[]): string {
  const runs: [number, number][] = [];
  for (const patch of [...new Set(patches)].sort((a, b) => a - b)) {
    const last = runs.at(-1);
    if (last && patch === last[1] + 1) last[1] = patch;
    else runs.push([patch, patch]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join();
}

export const isChanged = ({ heads, modes, patches, windows }: Changes): boolean =>
  heads.length + modes.length + patches.length + windows.length > 0;

/** The changes as the server takes them. */
export function changesBody(image: string, changes: Changes): string {
  const { heads, modes, patches, how, windows } = changes;
  return JSON.stringify({ image, heads_off: heads, modes, patches, how, windows });
}

/** With a head switched off, or on again. */
export function toggleHead(changes: Changes, layer: number, head: number): Changes {
  const others = changes.heads.filter(([l, h]) => l !== layer || h !== head);
  const heads: [number, number][] = others.length < changes.heads.length ? others : [...others, [layer, head]];
  return { ...changes, heads };
}

/** The window of a head around a patch: the last that is written for it, for all heads of its layer or all patches. */
export const windowAt = ({ windows }: Changes, layer: number, head: number, patch: number): Window | undefined =>
  windows.findLast((each) => each.layer === layer && (each.head ?? head) === head && (each.patch ?? patch) === patch);

/** Whether these are sides of a window: whole patches, none of them left empty. */
export const areSides = (sides: (number | null | undefined)[]): sides is Window["sides"] =>
  sides.length === 4 && sides.every((side) => Number.isInteger(side) && side! >= 0);

/** With other sides of a window. */
export const withSides = (changes: Changes, window: Window, sides: Window["sides"]): Changes => ({
  ...changes,
  windows: changes.windows.map((each) => (each === window ? { ...window, sides } : each)),
});

/** With a patch changed, or as it was. */
export function setPatch(changes: Changes, patch: number, on: boolean): Changes {
  const others = changes.patches.filter((each) => each !== patch);
  return { ...changes, patches: on ? [...others, patch].sort((a, b) => a - b) : others };
}

const SIDES = ["left", "up", "right", "down"];

export interface Named {
  words: string;
  /** The changes without this one. */
  without: Changes;
}

/** Each change in words, with what is left if it is taken back. */
export function inWords(changes: Changes, about: Study, modeWords: (mode: number) => string): Named[] {
  const { heads, modes, patches, how, windows } = changes;
  const rest = <T>(list: T[], at: number) => list.filter((_, i) => i !== at);
  // In the order of the answer's table: patches, windows, heads, parts of heads.
  const named: Named[] = [];
  if (patches.length)
    named.push({
      words: `${patches.length} ${patches.length === 1 ? "patch" : "patches"} ${HOW_WORDS[how]}`,
      without: { ...changes, patches: [] },
    });
  windows.forEach(({ layer, head, patch, sides }, at) =>
    named.push({
      words: `${head === null ? `all heads of L${layer}` : headName(layer, head)} of ${
        patch === null ? "every patch" : tokenName(about, layer, patch + (about.prefixes[layer] ?? 0))
      } within ${sides.map((side, at) => `${side} ${SIDES[at]}`).join(", ")}`,
      without: { ...changes, windows: rest(windows, at) },
    }),
  );
  heads.forEach(([layer, head], at) =>
    named.push({ words: `${headName(layer, head)} off`, without: { ...changes, heads: rest(heads, at) } }),
  );
  modes.forEach(([layer, head, mode], at) =>
    named.push({
      words: `${headName(layer, head)} without ${modeWords(mode)}`,
      without: { ...changes, modes: rest(modes, at) },
    }),
  );
  return named;
}
