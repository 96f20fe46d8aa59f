// The live model after the changes of the tab "What if": where tokens look then, and which of them moved.

import { whatIfNumbers } from "../api";
import { glance } from "../attention";
import { changesBody, isChanged, parseChanges } from "../changes";
import { gridOf, placeOfTokens, prefixNames } from "../grids";
import { shared } from "../state.svelte";
import type { Context } from "../types";
import { ATTENTION, betweenPatches, ownTop } from "./attention";
import type { At, Overlay, OverlayData } from "./overlay";
import { ends, sharedTop, type Weights } from "./paint";

const SOURCE = "the live model after the changes, computed now";
const plain = ATTENTION[0]!;

/** The attention of a head under the changes; that of the model as it is where nothing is changed. */
async function looks(context: Context, at: At, signal: AbortSignal): Promise<OverlayData> {
  const changes = parseChanges(shared.change, context.about);
  if (!isChanged(changes)) return plain.load(context, at, signal);
  const map = await whatIfNumbers("attention_after", changesBody(at.image, changes), at, signal);
  const n = map.shape[0]!;
  const prefix = context.about.prefixes[at.layer] ?? 0;
  const even = 1 / n;
  const top = Math.max(sharedTop(betweenPatches(map.values, n, prefix)), even * 2);
  return {
    paint(token, own): Weights {
      const seen = glance(map.values, n, prefix, Math.min(token, n - 1), false);
      return {
        kind: "weights",
        grid: gridOf(context.about, at.layer, n - prefix),
        values: seen.patches,
        floor: even,
        top: own ? ownTop(seen.patches, even) : top,
        floorName: "even",
        unit: "attention weight",
        prefix: prefixNames(context.about, prefix).map((name, i) => ({ name, value: seen.prefix[i]! })),
        what: "where it looks after the changes",
      };
    },
  };
}

/** How far each token of the layer moved. */
async function moved(context: Context, at: At, signal: AbortSignal): Promise<OverlayData> {
  const changes = parseChanges(shared.change, context.about);
  if (!isChanged(changes)) return { paint: () => undefined };
  const { layer } = at;
  const drift = await whatIfNumbers("token_drift", changesBody(at.image, changes), { layer }, signal);
  const tokens = drift.values as Float32Array;
  const place = placeOfTokens(context.about, layer, tokens);
  const prefix = place?.prefix ?? context.about.prefixes[layer] ?? 0;
  const grid = place?.grid ?? gridOf(context.about, layer); // patches may have been taken out
  const values = tokens.subarray(prefix, prefix + grid[0] * grid[1]);
  return {
    paint: (_token, own): Weights => ({
      kind: "weights",
      grid,
      values,
      floor: 0,
      top: Math.max(own ? ends(values)[1] : sharedTop(values), 1e-6),
      floorName: "unmoved",
      unit: "1 − cosine",
      prefix: [],
      what: "drift of the tokens",
    }),
  };
}

export const WHAT_IF: Overlay[] = [
  {
    id: "changed-looks",
    title: "attention after",
    reading:
      "Where the chosen token looks under the changes, from even attention up. A head that is off still has a map, and adds nothing.",
    source: SOURCE,
    tabs: ["what-if"],
    live: true,
    perToken: true,
    perHead: true,
    load: looks,
  },
  {
    id: "changed-tokens",
    title: "tokens that moved",
    reading: "How far each token of the layer has turned from where it was.",
    source: SOURCE,
    tabs: ["what-if"],
    live: true,
    perToken: false,
    perHead: false,
    load: moved,
  },
];
