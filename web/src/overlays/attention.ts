// Attention of the live model: where a token looks, and who looks at it. Both share one scale, from even attention up.

import { attention } from "../api";
import { glance } from "../attention";
import { gridOf, prefixNames } from "../grids";
import type { Context } from "../types";
import type { At, Overlay, OverlayData } from "./overlay";
import { ends, sharedTop, type Weights } from "./paint";

/** The end of a map's own scale; where nothing gets more than even attention, twice that. */
export const ownTop = (patches: Float32Array, even: number): number => {
  const most = ends(patches)[1];
  return most > even * 1.01 ? most : even * 2;
};

const SOURCE = "the model's own attention after softmax, computed live";

async function load(context: Context, at: At, signal: AbortSignal, column: boolean): Promise<OverlayData> {
  const map = await attention(at.image, at.layer, at.head, signal);
  const n = map.shape[0]!;
  const prefix = context.about.prefixes[at.layer] ?? 0;
  const grid = gridOf(context.about, at.layer, n - prefix);
  const even = 1 / n;
  const shared = Math.max(sharedTop(betweenPatches(map.values, n, prefix)), even * 2);
  const names = prefixNames(context.about, prefix);
  return {
    paint(token, own): Weights {
      const seen = glance(map.values, n, prefix, Math.min(token, n - 1), column);
      return {
        kind: "weights",
        grid,
        values: seen.patches,
        floor: even,
        top: own ? ownTop(seen.patches, even) : shared,
        floorName: "even",
        unit: "attention weight",
        prefix: names.map((name, i) => ({ name, value: seen.prefix[i]! })),
        what: column ? "who looks at it" : "where it looks",
      };
    },
  };
}

/** The weights from patches and class token to patches: what the scale is taken from. */
export function betweenPatches(values: ArrayLike<number>, n: number, prefix: number): Float32Array {
  const cells = new Float32Array(n * (n - prefix));
  for (let query = 0, at = 0; query < n; query++)
    for (let key = prefix; key < n; key++) cells[at++] = values[query * n + key]!;
  return cells;
}

export const ATTENTION: Overlay[] = [
  {
    id: "looks",
    title: "where it looks",
    reading: "Where the chosen token looks, from even attention up. Pointing reads a patch; a click looks from there.",
    source: SOURCE,
    tabs: ["heads", "patterns"],
    live: true,
    perToken: true,
    perHead: true,
    load: (context, at, signal) => load(context, at, signal, false),
  },
  {
    id: "looked-at",
    title: "who looks at it",
    reading: "Which patches look at the chosen token, in the same scale as where it looks.",
    source: SOURCE,
    tabs: ["heads", "patterns"],
    live: true,
    perToken: true,
    perHead: true,
    load: (context, at, signal) => load(context, at, signal, true),
  },
];
