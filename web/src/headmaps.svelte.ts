// Small attention maps of every head: of one image, or the mean over some of the selected ones as they come in.

import { headMaps } from "./api";
import { gridOf } from "./grids";
import { sharedTop, type Weights } from "./overlays/paint";
import type { NamedArray, Selection, Study } from "./types";

/** Images that a mean is taken over: each is a pass through the model. */
export const MEAN_OF = 16;

/** At most `most` of some indices, evenly spaced, first and last included. */
export function evenly(indices: Int32Array, most: number): number[] {
  const n = Math.min(most, indices.length);
  const at = (i: number) => (n === 1 ? 0 : Math.round((i * (indices.length - 1)) / (n - 1)));
  return [...new Set(Array.from({ length: n }, (_, i) => indices[at(i)]!))];
}

export interface HeadMaps {
  /** [layer, head, patch], padded. */
  shape: [number, number, number];
  values: Float32Array;
  n: number;
}

/** The mean of maps that came so far; each call of `put` adds one image. */
export class MeanMaps {
  #sum: Float32Array | undefined;
  #n = 0;

  put(maps: NamedArray): HeadMaps {
    this.#sum ??= new Float32Array(maps.values.length);
    for (let i = 0; i < this.#sum.length; i++) this.#sum[i] = this.#sum[i]! + maps.values[i]!;
    this.#n++;
    const n = this.#n;
    return { shape: maps.shape as [number, number, number], values: this.#sum.map((sum) => sum / n), n };
  }
}

/** Ask for maps one after the other, telling each mean on the way; stops when the signal says so. */
export async function meanMaps(
  images: string[],
  signal: AbortSignal,
  told: (maps: HeadMaps) => void,
): Promise<HeadMaps | undefined> {
  const mean = new MeanMaps();
  let last: HeadMaps | undefined;
  for (const image of images) {
    last = mean.put(await headMaps(image, signal));
    if (signal.aborted) return undefined;
    told(last);
  }
  return last;
}

/** The images whose maps are shown: the one at hand, or some of the selected ones; in a file those that it holds. */
export function imagesOf(scope: "image" | "set", image: string, selection: Selection, about: Study): string[] {
  const held = about.recorded_maps;
  if (held.length)
    return held.filter((each) => (scope === "image" ? String(each) === image : selection.mask[each])).map(String);
  return scope === "image" ? [image] : evenly(selection.indices, MEAN_OF).map(String);
}

/** What each patch gets of the attention that falls on patches: what a head gives the class token would leave all others
 * pale, and stands beside the photograph. */
export function amongPatches(maps: HeadMaps): HeadMaps {
  const size = maps.shape[2];
  const values = maps.values.slice();
  for (let start = 0; start < values.length; start += size) {
    const own = values.subarray(start, start + size);
    const sum = own.reduce((total, value) => total + (Number.isNaN(value) ? 0 : value), 0);
    for (let i = 0; i < size; i++) own[i] = sum > 0 ? own[i]! / sum : NaN;
  }
  return { ...maps, values };
}

/** One head's small map, of `amongPatches`, full at `times` even attention, or at its own greatest weight. */
export function headPaint(maps: HeadMaps, cell: number, about: Study, times: number | undefined): Weights | undefined {
  const [, nHeads, nPatches] = maps.shape;
  const layer = Math.floor(cell / nHeads);
  const grid = gridOf(about, layer, nPatches);
  const n = grid[0] * grid[1];
  const values = maps.values.subarray(cell * nPatches, cell * nPatches + n);
  if (Number.isNaN(values[0])) return undefined;
  const even = 1 / n;
  const top = times === undefined ? sharedTop(values) : times * even;
  const what = "share of the attention on patches";
  return {
    kind: "weights",
    grid,
    values,
    floor: even,
    top: Math.max(top, even * 1.2),
    floorName: "even",
    unit: "",
    prefix: [],
    what,
  };
}

/** Sinks get twenty times even attention and more: in a scale up to them, all that looks at content would be blank. */
const MOST_TIMES = 4;

/** Where the scale that all heads share ends, in multiples of even attention. */
export function topOf(maps: HeadMaps, about: Study): number {
  const [nLayers, nHeads, nPatches] = maps.shape;
  const times = maps.values.slice();
  for (let layer = 0; layer < nLayers; layer++) {
    const [rows, columns] = gridOf(about, layer, nPatches);
    const [start, size] = [layer * nHeads * nPatches, nHeads * nPatches];
    for (let i = start; i < start + size; i++) times[i] = times[i]! * rows * columns;
  }
  return Math.min(MOST_TIMES, sharedTop(times));
}
