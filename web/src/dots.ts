// The map of images: where it is looked at from, which dots are in sight, and their drawing, fast for 50,000.

import { extent } from "./palette";

/** What of the map is in sight: how many times it is magnified, and its middle as a share of the whole map. */
export interface View {
  k: number;
  x: number;
  y: number;
}

export const WHOLE: View = { k: 1, x: 0.5, y: 0.5 };

/** Least and greatest x, least and greatest y. */
export type Bounds = [number, number, number, number];

/** Map units to pixels: px = ax x + bx, py = ay y + by. */
export interface Place {
  ax: number;
  bx: number;
  ay: number;
  by: number;
}

const MARGIN = 12;
/** Between thumbnails of one size, in sides: a quarter of each may be covered. */
const LEAST_GAP = 0.75;
/** Of the dots in sight, so many must have room as thumbnails before any becomes one. */
const ENOUGH = 0.6;
/** Sides of thumbnails, the largest that fit are taken; a stored thumbnail has 64 pixels. */
const SIDES = [48, 40, 32, 24];
/** Pictures that are drawn and, when new, asked of the server. */
export const MOST_THUMBNAILS = 150;
/** So many steps a dot's place is rounded to, in each pixel. */
const STEPS = 4;

export function bounds(xy: Float32Array): Bounds {
  const axes = [new Float32Array(xy.length / 2), new Float32Array(xy.length / 2)] as const;
  for (let i = 0; i < xy.length; i++) axes[(i & 1) as 0 | 1][i >> 1] = xy[i]!;
  return [...extent(axes[0]), ...extent(axes[1])];
}

/** Where the map lies. Its axes mean nothing, so one may be stretched, up to twice the other, to fill the view. */
export function place([left, right, top, bottom]: Bounds, width: number, height: number, view: View): Place {
  const fits = [(width - 2 * MARGIN) / (right - left || 1), (height - 2 * MARGIN) / (bottom - top || 1)] as const;
  const unit = 2 * Math.min(...fits);
  const [ax, ay] = [Math.min(unit, fits[0]) * view.k, Math.min(unit, fits[1]) * view.k];
  return {
    ax,
    bx: width / 2 - (ax * (left + right)) / 2 - (view.x - 0.5) * width * view.k,
    ay,
    by: height / 2 - (ay * (top + bottom)) / 2 - (view.y - 0.5) * height * view.k,
  };
}

export const onto = ({ ax, bx, ay, by }: Place, x: number, y: number): [number, number] => [ax * x + bx, ay * y + by];
export const back = ({ ax, bx, ay, by }: Place, px: number, py: number): [number, number] => [
  (px - bx) / ax,
  (py - by) / ay,
];

/** How far the map can be magnified: until a few of its dots fill the view. */
export const mostZoom = (n: number): number => Math.max(8, 2 * Math.sqrt(n));

/** The view magnified about a point of the screen, given as a share of its width and height; it stays on the map. */
export function zoomed({ k, x, y }: View, factor: number, [atX, atY]: [number, number], most: number): View {
  const next = Math.max(1, Math.min(most, k * factor));
  const middle = (at: number, share: number) => at + (share - 0.5) * (1 / k - 1 / next);
  return { k: next, x: inside(middle(x, atX), next), y: inside(middle(y, atY), next) };
}

/** The view moved with a drag, given as a share of the screen's width and height. */
export const panned = ({ k, x, y }: View, dx: number, dy: number): View => ({
  k,
  x: inside(x - dx / k, k),
  y: inside(y - dy / k, k),
});

const inside = (middle: number, k: number): number => Math.max(0.5 / k, Math.min(1 - 0.5 / k, middle));

/** The dot nearest to a point of the screen, none if all are further than `within` pixels. */
export function nearest(
  xy: Float32Array,
  { ax, bx, ay, by }: Place,
  px: number,
  py: number,
  within: number,
): number | undefined {
  let [best, least] = [-1, within * within];
  for (let i = 0; 2 * i < xy.length; i++) {
    const [dx, dy] = [ax * xy[2 * i]! + bx - px, ay * xy[2 * i + 1]! + by - py];
    const distance = dx * dx + dy * dy;
    if (distance < least) [best, least] = [i, distance];
  }
  return best < 0 ? undefined : best;
}

/** The dots in sight. */
export function inSight(xy: Float32Array, { ax, bx, ay, by }: Place, width: number, height: number): Int32Array {
  const found = new Int32Array(xy.length / 2);
  let n = 0;
  for (let i = 0; 2 * i < xy.length; i++) {
    const [px, py] = [ax * xy[2 * i]! + bx, ay * xy[2 * i + 1]! + by];
    if (px >= 0 && px <= width && py >= 0 && py <= height) found[n++] = i;
  }
  return found.subarray(0, n);
}

export interface Pictures {
  images: number[];
  /** Of each, in pixels. */
  side: number;
}

/**
 * Which dots in sight become thumbnails: as many as lie apart, once most do, `first` before all others. The rest stay
 * dots. An order without meaning takes turns among images that lie together, the same one however the map is moved.
 */
export function pictures(
  seen: Int32Array,
  xy: Float32Array,
  to: Place,
  first: (image: number) => number,
  { k, closest }: { k: number; closest: boolean },
): Pictures | undefined {
  if (!seen.length || seen.length > MOST_THUMBNAILS / ENOUGH) return undefined;
  const order = [...seen].sort((a, b) => first(b) - first(a) || turn(a) - turn(b));
  for (const size of SIDES) {
    const side = size * k;
    const images = apart(order, xy, to, side * LEAST_GAP).slice(0, MOST_THUMBNAILS);
    if (images.length >= ENOUGH * seen.length || (closest && size === SIDES.at(-1))) return { images, side };
  }
  return undefined;
}

const turn = (image: number): number => Math.imul(image + 1, 0x9e3779b1) >>> 0;

function apart(order: number[], xy: Float32Array, { ax, ay }: Place, gap: number): number[] {
  const images: number[] = [];
  for (const image of order) {
    const [x, y] = [xy[2 * image]!, xy[2 * image + 1]!];
    const near = (other: number) =>
      Math.abs(ax * (xy[2 * other]! - x)) < gap && Math.abs(ay * (xy[2 * other + 1]! - y)) < gap;
    if (!images.some(near)) images.push(image);
  }
  return images;
}

/** The diameter of a dot when `n` are in sight. */
export const dotSize = (n: number, width: number, height: number, k: number): number =>
  k * Math.max(1.5, Math.min(6.5, (0.42 * Math.sqrt((width * height) / Math.max(1, n))) / k));

export interface Dots {
  xy: Float32Array;
  to: Place;
  /** The images to draw. */
  seen: Int32Array;
  /** Each image's index into `palette`, colours as red, green, blue. */
  colour: Uint8Array;
  palette: [number, number, number][];
  /** The selection; those outside are faint and below. */
  mask: Uint8Array | undefined;
  /** Diameter, in pixels. */
  size: number;
}

export interface Pixels {
  data: Uint8ClampedArray<ArrayBuffer>;
  width: number;
  height: number;
  /** So many more on each side than are in sight, for dots at the edge. */
  edge: number;
}

/**
 * Dots as pixels, four bytes each: red, green, blue and opacity. A path of 50,000 arcs takes a browser without a
 * graphics card 80 ms; a disc that is added to the pixels costs what its own few pixels cost.
 */
export function pixelsOf(dots: Dots, width: number, height: number, ratio: number): Pixels {
  const edge = Math.ceil((dots.size * ratio) / 2) + 2;
  const pixels = { width: width + 2 * edge, height: height + 2 * edge, edge };
  const data = new Uint8ClampedArray(4 * pixels.width * pixels.height);
  const discs = discsOf(dots.size * ratio, pixels.width);
  if (dots.mask) {
    paint(data, pixels, dots, ratio, discs, 0, 0.13);
    paint(data, pixels, dots, ratio, discs, 1, 0.9);
  } else paint(data, pixels, dots, ratio, discs, 1, 0.78);
  return { data, ...pixels };
}

/** The bytes that a disc covers, from that of its square's corner on, and how much of each. */
interface Disc {
  bytes: Int32Array;
  covered: Float32Array;
}

/** A disc for each rounded place inside a pixel, row by row. */
function discsOf(diameter: number, width: number): Disc[] {
  const radius = diameter / 2;
  const across = Math.ceil(diameter) + 2;
  return Array.from({ length: STEPS * STEPS }, (_, step) => {
    const middle = (at: number) => radius + 0.5 + (at + 0.5) / STEPS;
    const [cx, cy] = [middle(step % STEPS), middle(Math.floor(step / STEPS))];
    const cells = Array.from({ length: across * across }, (_, at) => {
      const [column, row] = [at % across, Math.floor(at / across)];
      const cover = Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(column + 0.5 - cx, row + 0.5 - cy)));
      return { byte: 4 * (row * width + column), cover };
    }).filter(({ cover }) => cover > 0.02);
    return {
      bytes: Int32Array.from(cells, ({ byte }) => byte),
      covered: Float32Array.from(cells, ({ cover }) => cover),
    };
  });
}

function paint(
  data: Uint8ClampedArray,
  { width, edge }: Omit<Pixels, "data">,
  { xy, to, seen, colour, palette, mask, size }: Dots,
  ratio: number,
  discs: Disc[],
  chosen: 0 | 1,
  opacity: number,
): void {
  // The square of a disc begins this far left of its middle.
  const before = (size * ratio) / 2 + 0.5 - edge;
  for (let at = 0; at < seen.length; at++) {
    const image = seen[at]!;
    if (mask && mask[image] !== chosen) continue;
    const x = (to.ax * xy[2 * image]! + to.bx) * ratio - before;
    const y = (to.ay * xy[2 * image + 1]! + to.by) * ratio - before;
    const left = Math.floor(x);
    const top = Math.floor(y);
    const { bytes, covered } = discs[Math.floor((y - top) * STEPS) * STEPS + Math.floor((x - left) * STEPS)]!;
    const shade = palette[colour[image]!]!;
    const corner = 4 * (top * width + left);
    for (let cell = 0; cell < bytes.length; cell++) {
      const p = corner + bytes[cell]!;
      const over = covered[cell]! * opacity;
      const under = data[p + 3]! / 255;
      const both = over + under * (1 - over);
      const share = over / both;
      data[p] = data[p]! + (shade[0] - data[p]!) * share;
      data[p + 1] = data[p + 1]! + (shade[1] - data[p + 1]!) * share;
      data[p + 2] = data[p + 2]! + (shade[2] - data[p + 2]!) * share;
      data[p + 3] = both * 255;
    }
  }
}
