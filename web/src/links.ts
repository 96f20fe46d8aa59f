// The strongest links between the tokens before a layer and those after it. Pure.

import { strongest } from "./attention";

export interface Link {
  query: number;
  key: number;
  weight: number;
}

/** The strongest share of a map's cells, exactly floor(share * cells), the weakest first so that strong ones are drawn on top. */
export function linksOf(weights: ArrayLike<number>, n: number, share: number): Link[] {
  const { kept } = strongest(weights, share);
  const links: Link[] = [];
  for (let cell = 0; cell < kept.length; cell++)
    if (kept[cell]) links.push({ query: Math.floor(cell / n), key: cell % n, weight: weights[cell]! });
  return links.sort((a, b) => a.weight - b.weight);
}

/** Links in a few groups of like weight, the weakest first: a group is drawn as one path. */
export function byWeight(links: Link[], n: number): Link[][] {
  const size = Math.ceil(links.length / n);
  return Array.from({ length: n }, (_, i) => links.slice(i * size, (i + 1) * size)).filter((group) => group.length);
}
