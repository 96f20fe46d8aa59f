// Colours that people with any colour vision can order, and the scales that use them.

import { scaleLinear, scaleSequential } from "d3-scale";
import { interpolateCividis } from "d3-scale-chromatic";

export type Colours = ((value: number) => string) & { domain: () => number[] };

/** Okabe and Ito's eight colours without black; further groups share a grey. */
export const GROUPS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800"];
export const OTHERS = "#8d939c";

/** The page's own hues, written out because scales mix them; as in page.css. */
const SHADES = {
  light: { paper: "#f2f0eb", weight: "#cf4a0c", gain: "#0b7470", ink: "#3d4552" },
  dark: { paper: "#23272e", weight: "#ff8a4a", gain: "#4fc4bc", ink: "#c3c8d0" },
};
const shades = (dark: boolean) => SHADES[dark ? "dark" : "light"];

export const extent = (values: ArrayLike<number>): [number, number] => {
  let [low, high] = [Infinity, -Infinity];
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
};

const root = (share: number): number => Math.sign(share) * Math.sqrt(Math.abs(share));

/** Of what is lost or gained: nothing is the paper's shade, loss is the hue of weight. Square-root, so that small losses
 * can be told apart beside large ones; symmetric, so that equal shades are equal amounts. */
export function signedColours(far: number, dark: boolean): Colours {
  const { paper, weight, gain } = shades(dark);
  const scale = scaleLinear<string>([-1, 0, 1], [gain, paper, weight]).clamp(true);
  return Object.assign((value: number) => scale(root(value / (far || 1))), { domain: () => [-far, 0, far] });
}

/** 1, 2 or 5 times a power of ten, not below a number. */
function roundUp(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((digit) => digit * power).find((bound) => bound >= value * (1 - 1e-9)) ?? 10 * power;
}

/** Of probability that is lost or gained: of one image the whole scale; of means a round end above the largest, since
 * they would all be pale beside 1. */
export function lossColours(values: ArrayLike<number>, ofOne: boolean, dark: boolean): Colours {
  const largest = Math.max(...extent(values).map(Math.abs));
  return signedColours(ofOne || !(largest > 0) ? 1 : roundUp(largest), dark);
}

/** Of importance, from nothing to the most; of any other quantity, in the ink's own shade. */
export function amountColours(values: ArrayLike<number>, dark: boolean, fromZero: boolean): Colours {
  const [low, high] = extent(values);
  const { paper, weight, ink } = shades(dark);
  const domain = fromZero ? [Math.min(0, low), high || 1] : high > low ? [low, high] : [low - 0.5, low + 0.5];
  return scaleLinear<string>(domain, [paper, fromZero ? weight : ink]).clamp(true);
}

/** Sequential over the values' range, for dots. The darkest shades are left out where they would sink into a dark page. */
export function colours(values: ArrayLike<number>, dark: boolean): Colours {
  const [low, high] = extent(values);
  return scaleSequential((t: number) => interpolateCividis(dark ? 0.2 + 0.76 * t : 0.03 + 0.9 * t)).domain(
    high > low ? [low, high] : [low - 0.5, low + 0.5],
  );
}

/** Red, green and blue, to 255, of "rgb(r, g, b)" or "#rrggbb". */
export function channels(colour: string): [number, number, number] {
  const hex = /^#(..)(..)(..)$/.exec(colour);
  const [r, g, b] = hex ? hex.slice(1).map((part) => parseInt(part, 16)) : (colour.match(/[\d.]+/g) ?? []).map(Number);
  return [r ?? 0, g ?? 0, b ?? 0];
}

/** Black or white, whichever can be read on this colour. */
export function inkOn(colour: string): string {
  const [r, g, b] = channels(colour);
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#14161a" : "#ffffff";
}
