// The small chart beside a sentence: which numbers it has, and where what the sentence speaks of stands among them. Pure.

import type { Measure, Sentence } from "./types";

/** Bars of all heads from the greatest, or a line over layers. */
export interface Mini {
  kind: "heads" | "layers";
  values: number[];
  /** Position of the head or layer that the sentence singles out; -1 for none. */
  here: number;
}

/** How a sentence's measure is drawn small; undefined where it singles out no head and no layer. */
export function miniKind(sentence: Sentence, measure: Measure | undefined): Mini["kind"] | undefined {
  if (measure?.dims[0] !== "image" || measure.dims[1] !== "layer" || sentence.layer === null) return undefined;
  return measure.dims[2] === "head" && sentence.head !== null ? "heads" : "layers";
}

/** The small chart of a sentence that brings its numbers. */
export const ofLayers = (sentence: Sentence): Mini => ({
  kind: "layers",
  values: sentence.by_layer.map((value) => value ?? NaN),
  here: sentence.layer ?? -1,
});

/** The numbers of a small chart from means [layer, ...] or, of heads, [layer, head]; padding is left out. */
export function mini(kind: Mini["kind"], means: ArrayLike<number>, nLayers: number, sentence: Sentence): Mini {
  const size = means.length / nLayers;
  if (kind === "layers") {
    const values = Array.from({ length: nLayers }, (_, layer) => {
      const own = Array.from({ length: size }, (_, i) => means[layer * size + i]!).filter(Number.isFinite);
      return own.length ? own.reduce((sum, value) => sum + value, 0) / own.length : NaN;
    });
    return { kind, values, here: sentence.layer ?? -1 };
  }
  const order = Array.from(means, (value, at) => ({ value, at }))
    .filter(({ value }) => Number.isFinite(value))
    .sort((a, b) => b.value - a.value || a.at - b.at);
  const own = (sentence.layer ?? -1) * size + (sentence.head ?? 0);
  return { kind, values: order.map(({ value }) => value), here: order.findIndex(({ at }) => at === own) };
}
