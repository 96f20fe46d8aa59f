// How alike the tokens of a layer are to that of one patch and to each other, and how long tokens are. Pure.

import { gridOf, movedPatch, patchTokens } from "./grids";
import { GROUPS, OTHERS } from "./palette";
import type { NamedArray, Study } from "./types";

export interface Likeness {
  /** By layer: the patch most alike, the mean of those around it, the mean of all others; NaN where a layer has none. */
  most: Float32Array;
  around: Float32Array;
  all: Float32Array;
}

/** Cosines [layer, patch] to a patch of the first layer's grid, itself left out. */
export function likeness({ shape, values }: NamedArray, study: Study, patch: number): Likeness {
  const [nLayers, size] = shape as [number, number];
  const result: Likeness = {
    most: new Float32Array(nLayers).fill(NaN),
    around: new Float32Array(nLayers).fill(NaN),
    all: new Float32Array(nLayers).fill(NaN),
  };
  for (let layer = 0; layer < nLayers; layer++) {
    const grid = gridOf(study, layer, size);
    const n = grid[0] * grid[1];
    const row = values.subarray(layer * size, layer * size + n);
    if (Number.isNaN(row[0])) continue;
    const own = movedPatch(patch, gridOf(study, 0), grid);
    const near: number[] = [];
    let [sum, most] = [0, -Infinity];
    for (let other = 0; other < n; other++) {
      if (other === own) continue;
      sum += row[other]!;
      most = Math.max(most, row[other]!);
      if (hops(own, other, grid[1]) === 1) near.push(row[other]!);
    }
    if (n < 2) continue;
    result.most[layer] = most;
    result.all[layer] = sum / (n - 1);
    result.around[layer] = near.reduce((total, value) => total + value, 0) / near.length;
  }
  return result;
}

const hops = (a: number, b: number, columns: number): number =>
  Math.max(Math.abs(Math.floor(a / columns) - Math.floor(b / columns)), Math.abs((a % columns) - (b % columns)));

/** The patches with the greatest values, the greatest first, `without` left out. */
export function greatest(values: ArrayLike<number>, n: number, without = -1): { patch: number; value: number }[] {
  return Array.from(values, (value, patch) => ({ patch, value }))
    .filter(({ patch, value }) => patch !== without && Number.isFinite(value))
    .sort((a, b) => b.value - a.value || a.patch - b.patch)
    .slice(0, n);
}

export interface Lengths {
  chosen: Float32Array;
  median: Float32Array;
  low: Float32Array;
  high: Float32Array;
  /** The class token, where the model has one. */
  first: Float32Array | undefined;
}

/** Lengths of tokens by layer, [layer, token]: the chosen patch beside the middle and the 5 to 95 % of all patches. */
export function lengths({ shape, values }: NamedArray, study: Study, patch: number): Lengths {
  const [nLayers, size] = shape as [number, number];
  const nothing = () => new Float32Array(nLayers).fill(NaN);
  const result = { chosen: nothing(), median: nothing(), low: nothing(), high: nothing() };
  const first = study.class_token ? nothing() : undefined;
  for (let layer = 0; layer < nLayers; layer++) {
    const row = values.subarray(layer * size, (layer + 1) * size) as Float32Array;
    const found = patchTokens(study, layer, row);
    if (!found) {
      if (first && Number.isNaN(row[1] ?? NaN)) first[layer] = row[0]!; // the class token alone
      continue;
    }
    const { patches, prefix, grid } = found;
    if (!patches.length) continue;
    const sorted = Float32Array.from(patches).sort();
    if (grid) result.chosen[layer] = patches[movedPatch(patch, gridOf(study, 0), grid)]!;
    result.low[layer] = quantile(sorted, 0.05);
    result.median[layer] = quantile(sorted, 0.5);
    result.high[layer] = quantile(sorted, 0.95);
    if (first && prefix > 0) first[layer] = row[0]!;
  }
  return { ...result, first };
}

/** Of ascending values, between neighbours in proportion. */
function quantile(sorted: Float32Array, share: number): number {
  const at = share * (sorted.length - 1);
  const [below, above] = [sorted[Math.floor(at)]!, sorted[Math.ceil(at)]!];
  return below + (above - below) * (at - Math.floor(at));
}

export interface LaidOut {
  layer: number;
  /** Places from 0 to 1; the object of the patch, 0 for the background. */
  dots: { patch: number; object: number; x: number; y: number }[];
  /** The class token, laid out with the patches; none where the layer has none. */
  classToken?: { x: number; y: number };
}

/** Room that dots on the rim need. */
const RIM = 0.04;

/** The layers of [layer, patch, xy] that were laid out, each with the class token, [layer, xy], to fill a square. */
export function laidOut(
  { shape, values }: NamedArray,
  objects: ArrayLike<number>,
  classTokens?: NamedArray,
): LaidOut[] {
  const [nLayers, size] = shape as [number, number];
  return Array.from({ length: nLayers }, (_, layer): LaidOut => {
    const row = values.subarray(2 * layer * size, 2 * (layer + 1) * size);
    const ofClass = classTokens?.values.subarray(2 * layer, 2 * layer + 2);
    const star = ofClass && Number.isFinite(ofClass[0]) ? ofClass : undefined;
    const axis = (which: number) => {
      const all = Array.from({ length: size }, (_, patch) => row[2 * patch + which]!);
      const ends = star ? [...all, star[which]!] : all;
      const [low, high] = [Math.min(...ends), Math.max(...ends)];
      return ends.map((value) => RIM + ((1 - 2 * RIM) * (value - low)) / (high - low || 1));
    };
    const [x, y] = [axis(0), axis(1)];
    const dots = Array.from({ length: size }, (_, patch) => ({
      patch,
      object: objects[patch]!,
      x: x[patch]!,
      y: y[patch]!,
    }));
    return {
      layer,
      dots: dots.filter((dot) => Number.isFinite(dot.x + dot.y)),
      ...(star && { classToken: { x: x[size]!, y: y[size]! } }),
    };
  }).filter(({ dots }) => dots.length);
}

/** The colour of an object among those of an image: groups' colours in the order of their ids, grey for the background. */
export function objectColour(object: number, objects: number[]): string {
  const at = objects.filter((each) => each > 0).indexOf(object);
  return at < 0 ? OTHERS : GROUPS[at % GROUPS.length]!;
}
