// Every stored measure that has a value for each patch or token, drawn by the dimensions that it has.

import { array } from "../api";
import { gridOf, patchesOf, patchScale, placeOfTokens, prefixNames } from "../grids";
import { tabOf } from "../tabs";
import type { Measure, NamedArray, Study } from "../types";
import type { Overlay, OverlayData } from "./overlay";
import { coverage, ends, flow, longest, sharedTop, type Paint } from "./paint";

/** Dimensions beside image, layer and head that a photograph can show: whether they follow one patch, and how what is
 * drawn is read where it is no colour from low to high. */
const DRAWN: Record<string, { perToken: boolean; reading?: string }> = {
  patch: { perToken: false },
  token: { perToken: false },
  "patch,xy": { perToken: false, reading: "An arrow a patch, in patches of its layer." },
  "patch,side": {
    perToken: true,
    reading: "The framed patch's own box, which need not hold it. Pointing shows others'.",
  },
  "patch,channel": { perToken: false, reading: "A colour a patch: alike colours, alike values." },
};

const rest = (measure: Measure): string =>
  measure.dims.filter((dim) => !["image", "layer", "head"].includes(dim)).join();

export function storedOverlays(study: Study): Overlay[] {
  const overlays = ofMeasures(study).flatMap((overlay) =>
    rest(study.measures[overlay.id]!) === "patch,side" ? [overlay, ofSum(overlay)] : [overlay],
  );
  const tendency = overlays.findIndex(({ id }) => id === "tendency");
  return tendency < 0 ? overlays : overlays.toSpliced(tendency + 1, 0, ofFlow(overlays[tendency]!));
}

/** The tendency of patches as a flow: its colours are explained by a wheel. */
function ofFlow(tendency: Overlay): Overlay {
  return {
    ...tendency,
    id: "tendency-flow",
    title: `${tendency.title}, as a flow`,
    reading: "Colour: where a patch takes from, as on the wheel. Strong: far from it; plain: from all around.",
    load: async (context, at, signal): Promise<OverlayData> => {
      const { about } = context;
      return asFlow(about, about.measures.tendency!, await tendency.load(context, at, signal), at.layer);
    },
  };
}

/** Arrows of patches as colours, with the length at the rim of the wheel in the unit of the measure. */
export function asFlow(study: Study, measure: Measure, arrowed: OverlayData, chosen: number): OverlayData {
  const paint = (layer: number, token: number): Paint | undefined => {
    const arrows = arrowed.strip!(layer, token);
    if (arrows?.kind !== "arrows") return undefined;
    const far = longest(arrows.xy);
    const wheel = { length: far * patchScale(study, layer), unit: measure.unit.split(",")[0]! };
    return { kind: "tints", grid: arrows.grid, what: arrows.what, ...flow(arrows.xy, far), wheel };
  };
  return { paint: (token) => paint(chosen, token), strip: paint };
}

/** The windows of all patches on top of each other. */
function ofSum(windows: Overlay): Overlay {
  return {
    ...windows,
    id: `${windows.id}-sum`,
    title: `${windows.title}, summed`,
    reading: "The share of the patches that have this one in their window.",
    perToken: false,
    load: async (context, at, signal): Promise<OverlayData> => {
      const { strip } = await windows.load(context, at, signal);
      const paint = (layer: number): Paint => {
        const [prefix, grid] = [context.about.prefixes[layer] ?? 0, gridOf(context.about, layer)];
        const boxes = Array.from({ length: grid[0] * grid[1] }, (_, patch) => strip!(layer, prefix + patch));
        const values = coverage(
          boxes.map((box) => (box?.kind === "box" ? box.sides : undefined)),
          grid,
        );
        const what = "windows that hold the patch";
        const top = Math.max(ends(values)[1], 1e-9);
        return { kind: "weights", grid, what, values, floor: 0, top, floorName: "", unit: "of all", prefix: [] };
      };
      return { paint: () => paint(at.layer), strip: paint };
    },
  };
}

function ofMeasures(study: Study): Overlay[] {
  return Object.entries(study.measures)
    .filter(([, measure]) => measure.dims[0] === "image" && measure.dims[1] === "layer" && rest(measure) in DRAWN)
    .map(([name, measure]) => ({
      id: name,
      title: measure.title,
      reading:
        DRAWN[rest(measure)]!.reading ?? `${sentence("Low", measure.low)}${sentence("High", measure.high)}`.trimEnd(),
      source: measure.source,
      tabs: [tabOf(name, study)],
      live: false,
      perToken: DRAWN[rest(measure)]!.perToken,
      perHead: measure.dims.includes("head"),
      load: async (_context, at) => {
        const head = measure.dims.includes("head") ? { head: at.head } : {};
        return stored(study, measure, await array(name, { image: at.image, ...head }), at.layer);
      },
    }));
}

const sentence = (end: string, words: string): string => (words ? `${end}: ${words}. ` : "");

/** One image's array, [layer, patch ...], as something to paint. */
export function stored(study: Study, measure: Measure, found: NamedArray, chosen: number): OverlayData {
  const size = found.values.length / found.shape[0]!;
  const row = (layer: number) => found.values.subarray(layer * size, (layer + 1) * size) as Float32Array;
  const paint = (layer: number, token: number, own: boolean): Paint | undefined => {
    const values = row(layer);
    const kind = rest(measure);
    const place = kind === "token" ? placeOfTokens(study, layer, values) : undefined;
    if (kind === "token" && !place) return undefined;
    const grid = place?.grid ?? gridOf(study, layer);
    const n = grid[0] * grid[1];
    const prefix = place?.prefix ?? study.prefixes[layer] ?? 0;
    const base = { grid, what: measure.title };
    const unit = measure.unit.startsWith("patches") ? patchesOf(study, layer) : measure.unit;
    if (kind === "patch,channel") return { kind: "tints", ...base, rgb: values.subarray(0, 3 * n) };
    if (kind === "patch,xy") return { kind: "arrows", ...base, unit, xy: values.subarray(0, 2 * n) };
    if (kind === "patch,side") {
      const at = 4 * Math.max(0, Math.min(n - 1, token - prefix));
      const sides = Array.from(values.subarray(at, at + 4)) as [number, number, number, number];
      return sides.some((side) => Number.isNaN(side)) ? undefined : { kind: "box", ...base, unit, sides };
    }
    if (found.values instanceof Uint8Array)
      return { kind: "marks", ...base, on: found.values.subarray(layer * size, layer * size + n) };
    const start = kind === "token" ? prefix : 0;
    const patches = values.subarray(start, start + n);
    const names = kind === "token" ? prefixNames(study, prefix) : [];
    const [low, high] = own ? ends(patches) : [ends(patches)[0], sharedTop(patches)];
    return {
      kind: "weights",
      ...base,
      values: patches,
      floor: low,
      top: Math.max(high, low + 1e-9),
      floorName: "",
      unit: measure.unit === "1" ? "" : measure.unit,
      prefix: names.map((name, i) => ({ name, value: values[i]! })),
    };
  };
  return {
    paint: (token, own) => paint(chosen, token, own),
    strip: (layer, token) => paint(layer, token, false),
  };
}
