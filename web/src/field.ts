// What a measure of patches says of the chosen patch, layer by layer. Pure.

import { gridOf, movedPatch, patchScale } from "./grids";
import type { NamedArray, Study } from "./types";

/** The values of one patch of the first layer's grid, from [layer, patch]. */
export function ofPatch(values: ArrayLike<number>, nLayers: number, study: Study, patch: number): Float32Array {
  const size = values.length / nLayers;
  return Float32Array.from({ length: nLayers }, (_, layer) => {
    const grid = study.grids[layer];
    return grid ? values[layer * size + movedPatch(patch, gridOf(study, 0), grid)]! : NaN;
  });
}

/** The mean over the patches of each layer, from [layer, patch]; padding is left out. */
export function overPatches(values: ArrayLike<number>, nLayers: number, study: Study): Float32Array {
  const size = values.length / nLayers;
  return Float32Array.from({ length: nLayers }, (_, layer) => {
    const grid = study.grids[layer];
    if (!grid) return NaN;
    const n = grid[0] * grid[1];
    let sum = 0;
    for (let at = 0; at < n; at++) sum += values[layer * size + at]!;
    return sum / n;
  });
}

export interface Pull {
  layer: number;
  x: number;
  y: number;
  length: number;
}

/** Where the chosen patch is pulled in each layer, from [layer, patch, xy] in patches of each layer: in those of the first
 * layer, so that layers compare. Layers without a grid are left out. */
export function pulls({ shape, values }: NamedArray, study: Study, patch: number): Pull[] {
  const [nLayers, size] = shape as [number, number];
  return Array.from({ length: nLayers }, (_, layer): Pull => {
    const grid = study.grids[layer];
    const at = grid ? 2 * (layer * size + movedPatch(patch, gridOf(study, 0), grid)) : -1;
    const scale = patchScale(study, layer);
    const [x, y] = at < 0 ? [NaN, NaN] : [scale * values[at]!, scale * values[at + 1]!];
    return { layer, x, y, length: Math.hypot(x, y) };
  }).filter(({ length }) => Number.isFinite(length));
}
