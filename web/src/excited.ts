// Which photographs excite a neuron, where, and which neuron a photograph singles out.

import type { Study } from "./types";

export interface PeakLayer {
  name: string;
  /** Undefined where the study does not say which it is. */
  layer: number | undefined;
  grid: [number, number] | undefined;
}

/** The layer whose neurons were read: the last that returns the patches it was given. A study of an older version
 * knows the grid alone, and only if all layers share one. */
export function peakLayer(about: Study): PeakLayer {
  if (about.own_grid_layers?.length) {
    const layer = Math.max(...about.own_grid_layers);
    return { name: `L${layer}`, layer, grid: about.grids[layer] ?? undefined };
  }
  const [first, ...others] = about.grids;
  const grid = first && others.every((each) => each?.join() === first.join()) ? first : undefined;
  return { name: "the last layer that returns the patches it is given", layer: undefined, grid };
}

export interface Excited {
  image: number;
  /** Where the neuron peaks in it, row by row. */
  patch: number;
  value: number;
}

const MOST = 8;

/** The images among `chosen` in which a neuron peaks highest. */
export function excited(peaks: ArrayLike<number>, patches: ArrayLike<number>, chosen: Int32Array): Excited[] {
  return [...chosen]
    .filter((image) => !Number.isNaN(peaks[image]!))
    .sort((a, b) => peaks[b]! - peaks[a]! || a - b)
    .slice(0, MOST)
    .map((image) => ({ image, patch: patches[image]!, value: peaks[image]! }));
}

/** The neuron whose peak lies furthest above its median, in widths of its usual range. */
export function singled(
  own: ArrayLike<number>,
  low: ArrayLike<number>,
  middle: ArrayLike<number>,
  high: ArrayLike<number>,
): number {
  let [best, furthest] = [0, -Infinity];
  for (let neuron = 0; neuron < own.length; neuron++) {
    const range = high[neuron]! - low[neuron]!;
    const beyond = range > 0 ? (own[neuron]! - middle[neuron]!) / range : -Infinity;
    if (beyond > furthest) [best, furthest] = [neuron, beyond];
  }
  return best;
}
