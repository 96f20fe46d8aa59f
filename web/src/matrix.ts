// A head's map as a picture. Pure.

import { HUE } from "./overlays/paint";

/** The share of a picture's side that the tokens before the patches take: one in two hundred would not be seen. */
const STRIP = 0.03;

/** The token at each place of a picture's side: those before the patches several times. */
export function thickened(n: number, prefix: number): number[] {
  const times = Math.max(1, Math.round(STRIP * n));
  const before = Array.from({ length: prefix * times }, (_, place) => Math.floor(place / times));
  return [...before, ...Array.from({ length: n - prefix }, (_, patch) => prefix + patch)];
}

/** A map's scale ends at so many times even attention at least: one that is nearly even is drawn pale, not full. */
const LEAST_TIMES = 4;

/** Where the scale of a map over `n` tokens ends: at the weight given, or its greatest. */
export const scaleTop = (weights: ArrayLike<number>, n: number, top = greatest(weights)): number =>
  Math.max(top, LEAST_TIMES / n);

/** Weights as pixels: one hue, opacity is the square root, so that weak cells can be told apart. */
export function matrixPixels(weights: ArrayLike<number>, n: number, places: number[], top: number): Uint8ClampedArray {
  const data = new Uint8ClampedArray(4 * places.length ** 2);
  const [red, green, blue] = HUE;
  let at = 0;
  for (const query of places)
    for (const key of places) {
      const share = Math.min(1, Math.max(0, weights[query * n + key]! / top)) || 0;
      data[at++] = red;
      data[at++] = green;
      data[at++] = blue;
      data[at++] = 255 * Math.sqrt(share);
    }
  return data;
}

function greatest(weights: ArrayLike<number>): number {
  let most = 0;
  for (let i = 0; i < weights.length; i++) if (weights[i]! > most) most = weights[i]!;
  return most || 1;
}
