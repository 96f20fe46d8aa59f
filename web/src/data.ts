// What several views ask of the study, put together from the server's arrays.

import { array, ids, summary, type SummaryAsk } from "./api";
import type { Row } from "./export";
import { printedUnit } from "./format";
import { slice } from "./slices";
import {
  STATISTICS,
  type Facts,
  type Images,
  type Measure,
  type Selection,
  type Statistic,
  type Study,
  type Summary,
} from "./types";

/** One number per head, [layer, head], NaN where a layer has no such head; with an interval if it is a mean. */
export interface HeadValues {
  metric: string;
  values: Float32Array;
  low?: Float32Array;
  high?: Float32Array;
  n: number;
  interval?: string;
}

export const set = (selection: Selection): SummaryAsk => {
  if (!selection.indices.length) throw new Error("No image matches the selection. Loosen a filter or clear it (Esc).");
  return selection.all ? {} : { set: { key: selection.key, images: selection.indices } };
};

export const statistic = (told: Summary, name: Statistic): Float32Array => {
  const size = told.values.length / STATISTICS.length;
  const at = STATISTICS.indexOf(name);
  return (told.values as Float32Array).subarray(at * size, (at + 1) * size);
};

/** A measure as it is shown: one that has a baseline is shown as what is lost, so that 0 is no effect. */
export interface Quantity {
  name: string;
  title: string;
  unit: string;
  /** Losses and gains around 0. */
  isCost: boolean;
  /** A change from 0 that says how much a head matters. */
  isChange: boolean;
}

export function quantity(name: string, about: Study): Quantity {
  const measure = about.measures[name] as Measure;
  const baseline = about.measures[measure.baseline];
  const unit = printedUnit(measure.unit);
  return baseline
    ? { name, title: `${baseline.title} lost`, unit, isCost: true, isChange: true }
    : { name, title: measure.title, unit, isCost: false, isChange: name.startsWith("head_") };
}

/** A measure of every head as it is shown: of the image at hand, or its mean over the selection. */
export async function headValues(
  name: string,
  scope: "image" | "set",
  image: string,
  selection: Selection,
  about: Study,
): Promise<HeadValues> {
  const { isCost } = quantity(name, about);
  if (scope === "image") {
    const [pruned, baseline] = await Promise.all([
      array(name, { image }),
      isCost ? array(about.measures[name]!.baseline, { image }) : undefined,
    ]);
    const values = presentHeads(pruned.values, about.n_heads);
    if (!baseline) return { metric: name, values, n: 1 };
    const plain = baseline.values[0]!;
    return { metric: name, values: values.map((value) => plain - value), n: 1 };
  }
  const told = await summary(name, { ...set(selection), ...(isCost ? { cost: 1 as const } : {}) });
  const [values, low, high] = (["mean", "low", "high"] as const).map((wanted) => statistic(told, wanted));
  return { metric: name, values: values!, low: low!, high: high!, n: told.n_images, interval: told.interval };
}

/** Numbers [layer, head], NaN for heads that a layer does not have: measures that count or are yes or no hold 0 there. */
export function presentHeads(values: ArrayLike<number>, nHeads: number[]): Float32Array {
  const widest = Math.max(...nHeads);
  return Float32Array.from(values, (value, at) => (at % widest < nHeads[Math.floor(at / widest)]! ? value : NaN));
}

/** A measure along its last dimension: of the image at hand, and mean and spread over the selection. */
export interface Along {
  one: Float32Array | undefined;
  mean: Float32Array;
  low: Float32Array;
  high: Float32Array;
  /** How many images the spread is of. */
  n: number;
}

/** Where a measure is read: at one head, or averaged over the heads of each layer. */
export type Place = { layer?: number; head?: number; over?: "head" };

/** The spread is from the 5 % to the 95 % quantile of the images; `one` is there only in the scope of one image. */
export async function along(
  name: string,
  { layer, head, over }: Place,
  { scope, image }: { scope: "image" | "set"; image: string },
  { selection, about }: { selection: Selection; about: Study },
): Promise<Along> {
  const place = { ...(layer === undefined ? {} : { layer }), ...(head === undefined ? {} : { head }) };
  const [one, many] = await Promise.all([
    scope === "image" ? array(name, { image }) : undefined,
    summary(name, { ...place, ...(over ? { over } : {}), ...set(selection) }),
  ]);
  const dims = many.dims.filter((dim) => dim !== "statistic");
  return {
    one: one && (over ? overHeads(one.values, about.n_heads) : slice(one, dims, place)),
    mean: statistic(many, "mean"),
    low: statistic(many, "q05"),
    high: statistic(many, "q95"),
    n: many.quantiles_of,
  };
}

/** The mean over the heads of each layer, [layer, head] padded to the widest layer. */
export function overHeads(values: ArrayLike<number>, nHeads: number[]): Float32Array {
  const widest = Math.max(...nHeads);
  return Float32Array.from(nHeads, (heads, layer) => {
    let sum = 0;
    for (let head = 0; head < heads; head++) sum += values[layer * widest + head]!;
    return sum / heads;
  });
}

/** A measure by layer: of the image at hand, or its mean over the selected images that have it in every layer. */
export async function byLayer(
  name: string,
  scope: "image" | "set",
  image: string,
  selection: Selection,
): Promise<{ values: Float32Array; n: number }> {
  if (scope === "image") return { values: (await array(name, { image })).values as Float32Array, n: 1 };
  const told = await summary(name, set(selection));
  return { values: statistic(told, "mean"), n: told.n_images };
}

/** A measure along steps as a table, a row a step. */
export const alongRows = (data: Along | undefined, step: string): Row[] =>
  Array.from(data?.mean ?? [], (mean, at) => ({
    [step]: at,
    ...(data?.one ? { this_image: data.one[at]! } : {}),
    mean,
    q05: data!.low[at]!,
    q95: data!.high[at]!,
  }));

/** Label, prediction and probability of the image at hand. */
export async function facts(image: string, images: Images, about: Study): Promise<Facts> {
  if (!image.startsWith("u")) {
    const at = Number(image);
    const named = (await ids())[at] ?? image;
    return {
      image,
      label: images.label[at]!,
      prediction: images.prediction?.[at],
      probability: images.probability?.[at],
      id: named,
    };
  }
  const one = async (name: string) => (name in about.measures ? (await array(name, { image })).values[0] : undefined);
  const [label, prediction, probability] = await Promise.all([one("label"), one("prediction"), one("probability")]);
  return { image, label: label ?? -1, prediction, probability, id: "your photograph" };
}

/** Whether the model takes an image for what its label says; undefined where there is no label of its own to tell by, as
 * of a photograph of the visitor's own, which has the model's prediction for one. */
export function isRight({ image, label, prediction }: Facts, about: Study): boolean | undefined {
  if (!about.own_labels || image.startsWith("u") || prediction === undefined || label < 0) return undefined;
  return prediction === label;
}

/** The image `steps` further among the selected ones, in their order; round at the ends. */
export function stepped(image: string, steps: number, { indices }: Selection): string {
  if (!indices.length) return image;
  const at = indices.findIndex((index) => index >= Number(image));
  const exact = at >= 0 && indices[at] === Number(image);
  const from = at < 0 ? indices.length : at;
  const to = exact || steps < 0 ? from + steps : from;
  return String(indices[(to + indices.length) % indices.length]);
}

/** Images by their value, the least or the greatest first, those without a value last; equal ones as they are numbered. */
export function ordered(images: Int32Array, value: (image: number) => number, isAscending: boolean): Int32Array {
  const sign = isAscending ? 1 : -1;
  const key = (image: number) => (Number.isNaN(value(image)) ? Infinity : sign * value(image));
  return images.slice().sort((a, b) => {
    const [first, second] = [key(a), key(b)];
    return first === second ? a - b : first - second;
  });
}

/** Among the images that have a value: how many they are, and the share of them below one value, NaN without one. */
export function standing(values: ArrayLike<number>, value: number | undefined): { n: number; below: number } {
  let [n, lower] = [0, 0];
  for (let i = 0; i < values.length; i++) {
    if (Number.isNaN(values[i])) continue;
    n++;
    if (values[i]! < value!) lower++;
  }
  return { n, below: value === undefined || Number.isNaN(value) || !n ? NaN : lower / n };
}

/** Bins of equal width from the least to the greatest value, counting all and those under `mask`; none without a value. */
export function binned(values: ArrayLike<number>, n: number, mask?: Uint8Array, domain?: [number, number]) {
  let [low, high] = domain ?? [Infinity, -Infinity];
  if (!domain) {
    for (let i = 0; i < values.length; i++) {
      if (values[i]! < low) low = values[i]!; // NaN, where an image has no value, is neither
      if (values[i]! > high) high = values[i]!;
    }
  }
  if (low > high) return [];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const width = (high - low) / n;
  const bins = Array.from({ length: n }, (_, i) => ({
    low: low + i * width,
    high: low + (i + 1) * width,
    all: 0,
    chosen: 0,
  }));
  for (let i = 0; i < values.length; i++) {
    const bin = bins[Math.min(n - 1, Math.floor((values[i]! - low) / width))];
    if (!bin) continue;
    bin.all++;
    if (mask?.[i]) bin.chosen++;
  }
  return bins;
}
