// Colours that people with any colour vision can order, and the scales that use them.

import { scaleDiverging, scaleSequential } from "d3-scale";
import { interpolateCividis, interpolateInferno, interpolatePuOr } from "d3-scale-chromatic";

export type Colours = ((value: number) => string) & { domain: () => number[] };

/** Okabe and Ito's eight colours without black; further groups share a grey. */
export const GROUPS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800"];
export const OTHERS = "#8d939c";

export const extent = (values: ArrayLike<number>): [number, number] => {
  let [low, high] = [Infinity, -Infinity];
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
};

/** Sequential over the values' range; diverging around 0 where they lie on both sides of it. The darkest shades are left
 * out where they would sink into a dark page. */
export function colours(values: ArrayLike<number>, dark: boolean): Colours {
  const [low, high] = extent(values);
  if (low < 0 && high > 0) {
    const far = Math.max(-low, high);
    return scaleDiverging((t: number) => interpolatePuOr(1 - t)).domain([-far, 0, far]);
  }
  return scaleSequential((t: number) => interpolateCividis(dark ? 0.2 + 0.76 * t : 0.03 + 0.9 * t)).domain(high > low ? [low, high] : [low - 0.5, low + 0.5]);
}

/** A veil over a photograph, for weights from 0 to 1 of the largest: dark where low, and light that lets the photograph
 * through where high. Dark and bright photographs both keep the order. */
export const veil = (share: number): { fill: string; opacity: number } => ({
  fill: interpolateInferno(0.03 + 0.87 * Math.sqrt(share)),
  opacity: 0.72 - 0.24 * Math.sqrt(share),
});

/** Black or white, whichever can be read on this colour ("rgb(r, g, b)" or "#rrggbb"). */
export function inkOn(colour: string): string {
  const hex = /^#(..)(..)(..)$/.exec(colour);
  const [r, g, b] = hex ? hex.slice(1).map((part) => parseInt(part, 16)) : (colour.match(/[\d.]+/g) ?? []).map(Number);
  return 0.299 * (r ?? 0) + 0.587 * (g ?? 0) + 0.114 * (b ?? 0) > 140 ? "#14161a" : "#ffffff";
}
