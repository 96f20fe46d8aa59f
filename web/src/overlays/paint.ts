// What lies over the photograph, as numbers: one system for every overlay. Pure functions, drawn by Photograph.svelte.

import { quickselect } from "d3-array";

export interface Prefix {
  name: string;
  value: number;
}

interface Base {
  grid: [number, number];
  /** What the numbers are, as a phrase: "attention of the class token". */
  what: string;
}

/** One hue over the grey photograph: opacity is where a value stands between `floor` and `top`. */
export interface Weights extends Base {
  kind: "weights";
  values: Float32Array;
  floor: number;
  top: number;
  /** What stands at the scale's lower end; the value alone where empty. */
  floorName: string;
  unit: string;
  /** Mass on class and register tokens, which lie on no patch. */
  prefix: Prefix[];
}

/** Patches that something is true of. */
export interface Marks extends Base {
  kind: "marks";
  on: Uint8Array;
}

/** A vector for each patch, in patches of the grid. */
export interface Arrows extends Base {
  kind: "arrows";
  /** What these patches are called. */
  unit: string;
  xy: Float32Array;
}

/** The box of one patch: left, top, right, bottom of it, in patches of the grid. */
export interface Box extends Base {
  kind: "box";
  /** What these patches are called. */
  unit: string;
  sides: [number, number, number, number];
}

/** A colour for each patch. */
export interface Tints extends Base {
  kind: "tints";
  rgb: Float32Array;
  /** Opacity by patch, 0 to 1; the greatest of all where absent. */
  alpha?: Float32Array;
  /** The length at the rim of the wheel that explains the colours, where they are directions. */
  wheel?: { length: number; unit: string };
}

export type Paint = Weights | Marks | Arrows | Box | Tints;

/** The hue of every overlay, and its greatest opacity: the photograph shows through everywhere. */
export const HUE = [255, 98, 20] as const;
export const MOST = 0.7;

/** The same overlay of two studies, weights with one scale for both. */
export function inOneScale(paints: (Paint | undefined)[]): (Paint | undefined)[] {
  const weights = paints.filter((paint) => paint?.kind === "weights");
  const floor = Math.min(...weights.map((paint) => paint.floor));
  const top = Math.max(...weights.map((paint) => paint.top));
  return paints.map((paint) => (paint?.kind === "weights" ? { ...paint, floor, top } : paint));
}

/** How opaque a weight is drawn; nothing below the floor. */
export function opacity(value: number, floor: number, top: number): number {
  if (!(top > floor) || Number.isNaN(value)) return 0;
  return MOST * Math.max(0, Math.min(1, (value - floor) / (top - floor)));
}

/** Whether an overlay of weights draws nothing at all: no value is above the floor. */
export const isBlank = (paint: Paint | undefined): boolean =>
  paint?.kind === "weights" && paint.values.every((value) => !(value > paint.floor));

/** The overlay as pixels, one a patch; kinds that are drawn as shapes have none. */
export function pixels(paint: Paint): Uint8ClampedArray | undefined {
  const n = paint.grid[0] * paint.grid[1];
  const data = new Uint8ClampedArray(4 * n);
  if (paint.kind === "weights" || paint.kind === "marks") {
    for (let i = 0; i < n; i++) {
      const alpha =
        paint.kind === "weights" ? opacity(paint.values[i]!, paint.floor, paint.top) : paint.on[i] ? MOST * 0.8 : 0;
      data.set([...HUE, 255 * alpha], 4 * i);
    }
    return data;
  }
  if (paint.kind === "tints") {
    for (let i = 0; i < n; i++)
      data.set([0, 1, 2].map((c) => 255 * paint.rgb[3 * i + c]!).concat(255 * MOST * (paint.alpha?.[i] ?? 1)), 4 * i);
    return data;
  }
  return undefined;
}

/** A direction as a colour: hue is where it points, as on the wheel; right is red, and hues go clockwise from there. */
export function directionColour(x: number, y: number): [number, number, number] {
  const turn = (Math.atan2(y, x) / (2 * Math.PI) + 1) % 1;
  const channel = (n: number) => {
    const k = (n + turn * 12) % 12;
    return WHEEL_LIGHT - WHEEL_DEPTH * Math.max(-1, Math.min(k - 3, 9 - k, 1));
  };
  return [channel(0), channel(8), channel(4)];
}

const WHEEL_LIGHT = 0.55;
const WHEEL_DEPTH = 0.4;

/** The length of the longest vector, 0.5 of a patch at least: what is nearly still is drawn pale. */
export function longest(xy: Float32Array): number {
  let far = 0.5;
  for (let i = 0; i + 1 < xy.length; i += 2) far = Math.max(far, Math.hypot(xy[i]!, xy[i + 1]!) || 0);
  return far;
}

/** Vectors of patches as colours: hue is the direction, opacity the length against the longest. */
export function flow(xy: Float32Array, far: number): { rgb: Float32Array; alpha: Float32Array } {
  const n = xy.length / 2;
  const rgb = new Float32Array(3 * n);
  const alpha = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    const [x, y] = [xy[2 * i]!, xy[2 * i + 1]!];
    rgb.set(directionColour(x, y), 3 * i);
    alpha[i] = Math.min(1, Math.hypot(x, y) / far) || 0;
  }
  return { rgb, alpha };
}

/** The share of windows that hold each patch: `boxes` has the window of each patch, none where it has no value. A patch
 * that a window holds in part counts in part. */
export function coverage(boxes: (Box["sides"] | undefined)[], [rows, columns]: [number, number]): Float32Array {
  const held = new Float32Array(rows * columns);
  const overlap = (cell: number, from: number, to: number) =>
    Math.max(0, Math.min(cell + 0.5, to + 0.5) - Math.max(cell - 0.5, from - 0.5));
  let n = 0;
  boxes.forEach((sides, patch) => {
    if (!sides) return;
    n++;
    const [left, top, right, bottom] = sides;
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const across = Array.from({ length: columns }, (_, at) => overlap(at, column - left, column + right));
    for (let y = 0; y < rows; y++) {
      const high = overlap(y, row - top, row + bottom);
      if (high) across.forEach((wide, x) => (held[y * columns + x]! += high * wide));
    }
  });
  return held.map((count) => count / Math.max(1, n));
}

/** The share of values that lie below the greatest drawn one; the rest is printed as "at least". */
const WITHIN = 0.995;

/** The ends of a scale that all patches of a layer share: its lower end, and the value that all but a few stay below. */
export function sharedTop(values: ArrayLike<number>): number {
  const present = new Float32Array(values.length);
  let n = 0;
  for (let i = 0; i < values.length; i++) if (!Number.isNaN(values[i])) present[n++] = values[i]!;
  if (!n) return 1;
  const at = Math.min(n - 1, Math.floor(WITHIN * n));
  quickselect(present as unknown as number[], at, 0, n - 1); // a map has up to ten million cells
  return present[at]!;
}

/** Least and greatest of some values, 0 and 1 where there are none. */
export function ends(values: ArrayLike<number>): [number, number] {
  let [low, high] = [Infinity, -Infinity];
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}
