// Any array of a study as something that can be drawn: which of its dimensions the picture shows, which are chosen.

import { patchScale, patchTokens } from "./grids";
import type { Measure, NamedArray, Study } from "./types";

/** How a measure is drawn, by the dimensions that it has. */
export type Drawing = "photograph" | "heads" | "line" | "one number";

export interface Layout {
  drawing: Drawing;
  /** Dimensions that the picture spans, in its order. */
  shown: string[];
  /** Dimensions of which one index is chosen: a slider each. */
  chosen: string[];
}

/** Dimensions along a photograph's patches or all tokens; the first is taken. */
const OVER_PHOTOGRAPH = ["patch", "token"];

export function layoutOf(dims: string[]): Layout {
  const own = dims.filter((dim) => dim !== "image");
  const others = (shown: string[]) => own.filter((dim) => !shown.includes(dim));
  const layout = (drawing: Drawing, shown: string[]): Layout => ({ drawing, shown, chosen: others(shown) });
  const overPhotograph = OVER_PHOTOGRAPH.find((dim) => own.includes(dim));
  if (overPhotograph) return layout("photograph", [overPhotograph]);
  if (own.includes("layer") && own.includes("head")) return layout("heads", ["layer", "head"]);
  if (own.includes("layer")) return layout("line", ["layer"]);
  return own.length ? layout("line", own.slice(-1)) : layout("one number", []);
}

/** Whether a mean over images can be taken of a measure and be read. */
export const hasMean = (measure: Measure): boolean => measure.dims[0] === "image" && measure.is_quantity;

/** The values along `shown`, in that order, with every other dimension at its index in `chosen` (0 where it has none). */
export function slice(array: NamedArray, shown: string[], chosen: Record<string, number>): Float32Array {
  const { dims, shape, values } = array;
  const strides = shape.map((_, at) => shape.slice(at + 1).reduce((product, size) => product * size, 1));
  let start = 0;
  dims.forEach((dim, at) => {
    if (shown.includes(dim)) return;
    start += Math.max(0, Math.min(shape[at]! - 1, chosen[dim] ?? 0)) * strides[at]!;
  });
  const axes = shown.map((dim) => dims.indexOf(dim));
  if (axes.includes(-1)) throw new Error(`An array of ${dims.join(", ")} has no ${shown.join(" and ")}.`);
  const sizes = axes.map((axis) => shape[axis]!);
  const result = new Float32Array(sizes.reduce((product, size) => product * size, 1));
  for (let cell = 0; cell < result.length; cell++) {
    let [rest, at] = [cell, start];
    for (let axis = axes.length - 1; axis >= 0; axis--) {
      at += (rest % sizes[axis]!) * strides[axes[axis]!]!;
      rest = Math.floor(rest / sizes[axis]!);
    }
    result[cell] = values[at]!;
  }
  return result;
}

/** Whether values are sides of boxes or arrows in patches of their layer, as they are drawn; told in numbers they are
 * lengths as all others, in patches of the first layer, which the unit of the measure says. */
export const isDrawnLength = ({ dims, unit }: Pick<Measure, "dims" | "unit">): boolean =>
  unit.startsWith("patches") && (dims.includes("xy") || dims.includes("side"));

/** The mean over a photograph's patches by layer, of one image, in the unit of the measure; of vectors along `xy` the mean
 * length, prefix tokens and padding left out; NaN for a layer that returns no patch. */
export function layerMeans(
  array: NamedArray,
  study: Study,
  chosen: Record<string, number>,
  measure: Pick<Measure, "dims" | "unit">,
): Float32Array {
  const nLayers = array.shape[array.dims.indexOf("layer")] ?? 1;
  const over = OVER_PHOTOGRAPH.find((dim) => array.dims.includes(dim))!;
  const vectors = array.dims.includes("xy");
  return Float32Array.from({ length: nLayers }, (_, layer) => {
    const shown = vectors ? [over, "xy"] : [over];
    const row = slice(array, shown, { ...chosen, layer });
    const values = vectors ? row.filter((_, at) => at % 2 === 0).map((x, at) => Math.hypot(x, row[2 * at + 1]!)) : row;
    const [rows, columns] = study.grids[layer] ?? [1, values.length];
    const patches = over === "token" ? patchTokens(study, layer, values)?.patches : values.subarray(0, rows * columns);
    const present = (patches ?? values.subarray(0, 0)).filter((value) => !Number.isNaN(value));
    const scale = isDrawnLength(measure) ? patchScale(study, layer) : 1;
    return present.length ? (scale * present.reduce((sum, value) => sum + value, 0)) / present.length : NaN;
  });
}
